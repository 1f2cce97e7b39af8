//! The accepting side of TLS: a certificate that can be exchanged while it is in use, and who may come.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::server::{StoresServerSessions, WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;

use super::{TlsStream, VERSIONS, load_authorities, load_certificates, load_key, provider, refusal, unusable};
use crate::error::Error;
use crate::transport::Transport;

/// TLS for a listener: its certificate and key, and whose certificates it demands of clients. Cheap to clone; clones
/// share what [`reload`](Self::reload) has read.
///
/// Only TLS 1.3 is spoken. Handshakes run beside each other and never hold up who comes after; each counts as an open
/// connection, has a [deadline](crate::ListenerBuilder::handshake_deadline), and there is a
/// [limit](crate::ListenerBuilder::max_handshakes) to how many are under way.
///
/// ```no_run
/// # async fn listen() -> Result<(), buffstreams::Error> {
/// use buffstreams::{Listener, TlsServer};
///
/// let tls = TlsServer::from_pem_files("server.pem", "server.key")?.client_ca("clients.pem")?;
/// let listener = Listener::builder().tls(tls.clone()).bind(":5031").await?;
/// let server = listener.spawn(|message: &[u8]| Ok(println!("{} bytes", message.len())));
/// // When the files have changed: connections that are open go on as they are.
/// tls.reload()?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct TlsServer {
    files: Arc<Files>,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

#[derive(Clone, Debug)]
struct Files {
    chain: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl TlsServer {
    /// Reads a certificate, followed by those that link it to its authority, and its private key (PKCS#8, PKCS#1 or SEC1),
    /// from PEM files. They may be the same file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Tls`](crate::ErrorKind::Tls), with the file, if one cannot be read or used, or the key is another's.
    pub fn from_pem_files(chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Result<TlsServer, Error> {
        let files = Files { chain: chain.into(), key: key.into(), client_ca: None };
        Ok(TlsServer { config: Arc::new(RwLock::new(files.load()?)), files: Arc::new(files) })
    }

    /// Demands a certificate of every client, of one of the authorities in this PEM file. Who has none is refused; who
    /// others are, their handlers see by [`Peer::identity`](crate::Peer::identity).
    ///
    /// # Errors
    ///
    /// As [`from_pem_files`](Self::from_pem_files).
    pub fn client_ca(mut self, authorities: impl Into<PathBuf>) -> Result<TlsServer, Error> {
        let files = Files { client_ca: Some(authorities.into()), ..(*self.files).clone() };
        self.config = Arc::new(RwLock::new(files.load()?));
        self.files = Arc::new(files);
        Ok(self)
    }

    /// Reads all files again. What they have now holds for handshakes that begin from now on, on every listener that has a
    /// clone of this; open connections go on. It blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// As [`from_pem_files`](Self::from_pem_files); then all stays as it was.
    pub fn reload(&self) -> Result<(), Error> {
        let config = self.files.load()?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// One handshake.
    ///
    /// # Errors
    ///
    /// What was wrong, for people; and the transport, on which the peer may still wait to be told.
    pub(crate) async fn accept(&self, io: Transport) -> Result<Transport, (String, Transport)> {
        let config = Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner));
        match TlsAcceptor::from(config).accept(io).into_fallible().await {
            Ok(stream) => Ok(Transport::Tls(TlsStream::new(stream))),
            Err((error, io)) => {
                let authorities = self.files.client_ca.as_deref().unwrap_or(Path::new("")).display();
                Err((refusal::words_of(&error, None, &format!("those in {authorities}")), io))
            }
        }
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Files {
    fn load(&self) -> Result<Arc<ServerConfig>, Error> {
        let Files { chain, key, client_ca } = self;
        let failed = |path: &Path, error| unusable(path, &error).because(error);
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|error| failed(chain, error))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(load_authorities(path)?, provider())
                    .build()
                    .map_err(|error| unusable(path, &error).because(error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config =
            builder.with_single_cert(load_certificates(chain)?, load_key(key)?).map_err(|error| match &error {
                rustls::Error::InconsistentKeys(_) => {
                    unusable(key, format_args!("it is not the key of the certificate in {}", chain.display()))
                }
                _ => failed(chain, error),
            })?;
        // A ticket tells a client at once that its certificate was accepted. It is good for nothing else.
        config.send_tls13_tickets = usize::from(client_ca.is_some());
        config.session_storage = Arc::new(Forgetful);
        Ok(Arc::new(config))
    }
}

/// Promises to remember sessions, and forgets them: each handshake verifies who the client is.
#[derive(Debug)]
struct Forgetful;

impl StoresServerSessions for Forgetful {
    fn put(&self, _: Vec<u8>, _: Vec<u8>) -> bool {
        true
    }

    fn get(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn can_cache(&self) -> bool {
        true
    }
}
