//! The yardstick of TLS: the bytes that BuffStreams puts on the wire, over a tokio-rustls stream, in blocks of 256 KiB,
//! without framing. Nobody looks at the bytes.
//!
//! Receiver and sender are processes of their own, and the one knows nothing of the other but a port. So the certificate,
//! made for each run, lies in a folder that is named after the port.

use std::fs;
use std::hint::black_box;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto, version};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::Result;
use crate::load::{Load, Work};
use crate::system::{Runner, System};
use crate::systems::buffstreams::frame_length;
use crate::tally::Tally;
use crate::worker::{Done, Gate, Receiving};

pub(crate) const SYSTEM: System = System {
    name: "raw-tls",
    about: "the same bytes over a bare tokio-rustls stream in blocks of 256 KiB, without messages",
    version: || env!("VERSION_OF_RUSTC").to_owned(),
    settings: "TLS 1.3, ring, no resumption; writes and reads of 256 KiB; TCP_NODELAY; a tokio task on each side",
    part: 1.0,
    reads_messages: false,
    runner: Some(&RawTls),
    feature: "",
};

/// Bytes of a write and of a read.
const BLOCK: usize = 256 * 1024;

/// Makes a certificate for this receiver: where it is, and where its key is.
pub(crate) fn make_certificate(receiver: SocketAddr) -> Result<(PathBuf, PathBuf)> {
    let folder = folder_of(receiver);
    fs::create_dir_all(&folder)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new([receiver.ip().to_string()])?.self_signed(&key)?;
    let (chain_file, key_file) = (certificate_of(receiver), folder.join("key.pem"));
    fs::write(&key_file, key.serialize_pem())?;
    fs::write(&chain_file, certificate.pem())?;
    Ok((chain_file, key_file))
}

/// Where the certificate of this receiver is.
pub(crate) fn certificate_of(receiver: SocketAddr) -> PathBuf {
    folder_of(receiver).join("certificate.pem")
}

/// Both ends have read it.
pub(crate) fn remove_certificate(receiver: SocketAddr) -> io::Result<()> {
    fs::remove_dir_all(folder_of(receiver))
}

fn folder_of(receiver: SocketAddr) -> PathBuf {
    std::env::temp_dir().join(format!("buffstreams-compare-{}", receiver.port()))
}

struct RawTls;

impl Runner for RawTls {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        async move {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            let frame = frame_length(&load)?;
            let (chain, key) = make_certificate(address)?;
            let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
                .with_protocol_versions(&[&version::TLS13])?
                .with_no_client_auth()
                .with_single_cert(vec![CertificateDer::from_pem_file(chain)?], PrivateKeyDer::from_pem_file(key)?)?;
            // Tickets that the sender never reads would make its kernel reset the connection at the end.
            config.send_tls13_tickets = 0;
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let accepting = tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (acceptor, mut counter) = (acceptor.clone(), tally.counter());
                    tokio::spawn(async move {
                        let Ok(mut stream) = acceptor.accept(stream).await else { return };
                        let mut block = vec![0; BLOCK];
                        let mut received = 0;
                        while let Ok(read @ 1..) = stream.read(&mut block).await {
                            received += black_box(&block[..read]).len();
                            counter.reach((received / frame) as u64);
                        }
                    });
                }
            });
            Ok(Receiving { address, at_work: Box::new(accepting) })
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        async move {
            if load.work != Work::Stream || load.connections != 1 {
                return Err("raw-tls only pours, over one connection".into());
            }
            let frame = frame_length(&load)?;
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(certificate_of(receiver))?)?;
            remove_certificate(receiver)?;
            let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
                .with_protocol_versions(&[&version::TLS13])?
                .with_root_certificates(roots)
                .with_no_client_auth();
            let stream = TcpStream::connect(receiver).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::from(receiver.ip());
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            stream.write_all(&vec![7; frame]).await?;
            stream.flush().await?;
            gate.pass()?;
            let sent = load.sent_share(0);
            let pouring = tokio::spawn(async move {
                let block = vec![7; BLOCK];
                let mut left = sent * frame as u64;
                while left > 0 {
                    let step = left.min(BLOCK as u64);
                    stream.write_all(&block[..step as usize]).await?;
                    left -= step;
                }
                stream.shutdown().await
            });
            pouring.await??;
            Ok(Done::default())
        }
        .boxed()
    }
}
