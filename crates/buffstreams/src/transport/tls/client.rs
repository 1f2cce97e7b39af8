//! The dialling side of TLS: whom to believe, which name to demand, and this side's own certificate.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Poll, ready};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, ReadBuf};
use tokio_rustls::TlsConnector;

use super::{TlsStream, VERSIONS, load_authorities, load_certificates, load_key, provider, refusal, unusable};
use crate::error::{Error, ErrorKind};
use crate::transport::{Address, Transport};

/// How long a server that has asked for a certificate is waited for to say something, before it is taken to accept it.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// TLS for a connection: the authorities that it believes, the name that it demands, and a certificate of its own if the
/// server asks for one. Cheap to clone; clones share what [`reload`](Self::reload) has read.
///
/// Only TLS 1.3 is spoken. The server must show a certificate of one of the authorities, for the name: that of the
/// [address](crate::Address), or [another](Self::server_name). There is no way to leave that out.
///
/// ```no_run
/// # async fn send() -> Result<(), buffstreams::Error> {
/// use buffstreams::{Connection, TlsClient};
///
/// let tls = TlsClient::with_system_roots()?;
/// let connection = Connection::builder().tls(tls).dial("collector.example.com:5031").await?;
///
/// let tls = TlsClient::with_ca_file("authority.pem")?.certificate("client.pem", "client.key")?;
/// let connection = Connection::builder().tls(tls).dial("collector.internal:5031").await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct TlsClient {
    files: Arc<Files>,
    loaded: Arc<RwLock<Arc<Loaded>>>,
    server_name: Option<ServerName<'static>>,
}

#[derive(Clone, Debug)]
struct Files {
    /// `None` for the system's authorities.
    ca: Option<PathBuf>,
    certificate: Option<(PathBuf, PathBuf)>,
}

struct Loaded {
    verifier: Arc<WebPkiServerVerifier>,
    certificate: Option<Arc<CertifiedKey>>,
}

impl TlsClient {
    /// Believes the authorities that the system does: on Unix those in its usual files, or in `SSL_CERT_FILE` and
    /// `SSL_CERT_DIR`; on Windows and macOS those in its store.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Tls`] if the system has none.
    pub fn with_system_roots() -> Result<TlsClient, Error> {
        TlsClient::load(Files { ca: None, certificate: None }, None)
    }

    /// Believes the authorities in this PEM file, and no others.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Tls`], with the file, if it cannot be read or has none.
    pub fn with_ca_file(authorities: impl Into<PathBuf>) -> Result<TlsClient, Error> {
        TlsClient::load(Files { ca: Some(authorities.into()), certificate: None }, None)
    }

    fn load(files: Files, server_name: Option<ServerName<'static>>) -> Result<TlsClient, Error> {
        let loaded = Arc::new(RwLock::new(Arc::new(files.load()?)));
        Ok(TlsClient { files: Arc::new(files), loaded, server_name })
    }

    /// This side's own certificate, followed by those that link it to its authority, and its private key (PKCS#8, PKCS#1 or
    /// SEC1), from PEM files. Shown to servers that ask for one.
    ///
    /// A server refuses a certificate only after the handshake. So where one has asked, nothing is sent before it has said
    /// anything, or a second has passed. A [`TlsServer`](crate::TlsServer) says something at once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Tls`], with the file, if one cannot be read or used, or the key is another's.
    pub fn certificate(self, chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Result<TlsClient, Error> {
        let files = Files { certificate: Some((chain.into(), key.into())), ..(*self.files).clone() };
        TlsClient::load(files, self.server_name)
    }

    /// The name or IP address that the server's certificate must be for, instead of the one it is dialled by.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfiguration`] if it is neither.
    pub fn server_name(mut self, name: &str) -> Result<TlsClient, Error> {
        self.server_name = Some(parse_name(name)?);
        Ok(self)
    }

    /// Reads all files, or the system's authorities, again. What they have now holds for handshakes that begin from now on,
    /// of every connection that has a clone of this; sockets that are open go on. It blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Tls`]; then all stays as it was.
    pub fn reload(&self) -> Result<(), Error> {
        let loaded = Arc::new(self.files.load()?);
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Whether there is a name to demand of whoever is at this address.
    pub(crate) fn check(&self, address: &Address) -> Result<(), Error> {
        self.name_for(address).map(drop)
    }

    fn name_for(&self, address: &Address) -> Result<ServerName<'static>, Error> {
        match (&self.server_name, address) {
            (Some(name), _) => Ok(name.clone()),
            (None, Address::Tcp { host, .. }) if host.is_empty() => parse_name("localhost"),
            // Which interface an IPv6 address belongs to is no matter of certificates.
            (None, Address::Tcp { host, .. }) => match host.split_once('%') {
                Some((address, _)) if address.contains(':') => parse_name(address),
                _ => parse_name(host),
            },
            (None, Address::Unix(_)) => {
                let text = format!("{address} has no name that a certificate could be for: give a server name");
                Err(Error::new(ErrorKind::InvalidConfiguration, text))
            }
        }
    }

    /// One handshake, and the server's first word if it has asked for a certificate.
    pub(crate) async fn connect(&self, io: Transport, address: &Address) -> Result<Transport, Error> {
        let name = self.name_for(address)?;
        let failed = |words: String, error: io::Error| {
            Error::new(ErrorKind::Tls, format!("no TLS with {address}: {words}")).because(error)
        };
        let loaded = Arc::clone(&self.loaded.read().unwrap_or_else(PoisonError::into_inner));
        let attempt = Arc::new(Attempt { loaded, was_asked: AtomicBool::new(false), seen: Mutex::new(None) });
        let config = attempt.config().map_err(|error| failed(error.to_string(), io::Error::other(error)))?;
        let mut stream = match TlsConnector::from(config).connect(name, io).await {
            Ok(stream) => stream,
            Err(error) => {
                let seen = attempt.seen.lock().unwrap_or_else(PoisonError::into_inner).take();
                return Err(failed(refusal::words_of(&error, seen.as_ref(), &self.files.authorities()), error));
            }
        };
        if attempt.was_asked.load(Ordering::Relaxed)
            && let Ok(Err(error)) = tokio::time::timeout(FIRST_WORD, first_word(&mut stream)).await
        {
            return Err(failed(refusal::words(&error), error));
        }
        Ok(Transport::Tls(TlsStream::new(stream)))
    }
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TlsClient { files, server_name, .. } = self;
        f.debug_struct("TlsClient").field("files", files).field("server_name", server_name).finish_non_exhaustive()
    }
}

fn parse_name(name: &str) -> Result<ServerName<'static>, Error> {
    ServerName::try_from(name.to_owned()).map_err(|error| {
        let text = format!("{name:?} is neither a DNS name nor an IP address, so no certificate can be for it");
        Error::new(ErrorKind::InvalidConfiguration, text).because(error)
    })
}

impl Files {
    fn load(&self) -> Result<Loaded, Error> {
        let (authorities, from) = match &self.ca {
            Some(path) => (load_authorities(path)?, path.as_path()),
            None => (system_authorities()?, Path::new("the system's authorities")),
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(authorities, provider())
            .build()
            .map_err(|error| unusable(from, &error).because(error))?;
        let certificate = match &self.certificate {
            None => None,
            Some((chain, key)) => {
                let certified = CertifiedKey::from_der(load_certificates(chain)?, load_key(key)?, &provider());
                Some(Arc::new(certified.map_err(|error| match &error {
                    rustls::Error::InconsistentKeys(_) => {
                        unusable(key, format_args!("it is not the key of the certificate in {}", chain.display()))
                    }
                    _ => unusable(chain, &error).because(error),
                })?))
            }
        };
        Ok(Loaded { verifier, certificate })
    }

    fn authorities(&self) -> String {
        match &self.ca {
            Some(path) => format!("those in {}", path.display()),
            None => "those that the system believes".into(),
        }
    }
}

fn system_authorities() -> Result<Arc<RootCertStore>, Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut authorities = RootCertStore::empty();
    // Stores of systems have some that nobody can use any more.
    authorities.add_parsable_certificates(found.certs);
    if authorities.is_empty() {
        let why: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        let text = format!("the system has no authorities to believe: {}", why.join("; "));
        return Err(Error::new(ErrorKind::Tls, text));
    }
    Ok(Arc::new(authorities))
}

/// What is noted of one handshake. It decides nothing: the verifier does.
struct Attempt {
    loaded: Arc<Loaded>,
    /// The server has asked for a certificate.
    was_asked: AtomicBool,
    /// The server's certificate, if it was not accepted.
    seen: Mutex<Option<CertificateDer<'static>>>,
}

impl Attempt {
    fn config(self: &Arc<Self>) -> Result<Arc<ClientConfig>, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)?
            // What is dangerous is a verifier that does not verify.
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(self) as _)
            .with_client_cert_resolver(Arc::clone(self) as _);
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Attempt {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verifier = &self.loaded.verifier;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).inspect_err(|_| {
            *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(end_entity.clone().into_owned());
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.loaded.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.loaded.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.loaded.verifier.supported_verify_schemes()
    }
}

impl ResolvesClientCert for Attempt {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.was_asked.store(true, Ordering::Relaxed);
        self.loaded.certificate.clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Waits for anything that the server says after the handshake: that it accepts this side's certificate, or that it
/// does not.
async fn first_word(stream: &mut tokio_rustls::client::TlsStream<Transport>) -> io::Result<()> {
    let (io, connection) = stream.get_mut();
    let mut bytes = [0; 4096];
    std::future::poll_fn(|cx| {
        loop {
            let state =
                connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let has_spoken = connection.tls13_tickets_received() > 0 || state.plaintext_bytes_to_read() > 0;
            if has_spoken || state.peer_has_closed() {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::new(&mut bytes);
            ready!(std::pin::Pin::new(&mut *io).poll_read(cx, &mut buffer))?;
            let mut read = buffer.filled();
            if read.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            while !read.is_empty() {
                connection.read_tls(&mut read)?;
                connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            }
        }
    })
    .await
}
