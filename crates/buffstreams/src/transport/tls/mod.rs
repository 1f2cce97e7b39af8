//! TLS 1.3 over a transport: what both sides have in common.
//!
//! No identity goes unverified, no handshake is resumed (a resumed one verifies nothing), and nothing is installed for the
//! whole process: each configuration brings its own cryptography.

mod client;
mod refusal;
mod server;
mod stream;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use client::TlsClient;
pub use server::TlsServer;
pub(crate) use stream::TlsStream;

use super::PeerIdentity;
use crate::error::{Error, ErrorKind};

/// The versions that are spoken.
const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The cryptography of the feature that is on; of both, that of AWS-LC.
fn provider() -> Arc<CryptoProvider> {
    #[cfg(feature = "tls-aws-lc")]
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    #[cfg(not(feature = "tls-aws-lc"))]
    let provider = rustls::crypto::ring::default_provider();
    Arc::new(provider)
}

/// What a verified certificate says of its subject.
fn identity(certificate: &CertificateDer<'_>) -> Option<PeerIdentity> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    let names = parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(String::from).collect();
    Some(PeerIdentity::new(certificate, parsed.subject(), names))
}

fn unusable(path: &Path, why: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Tls, format!("{}: {why}", path.display()))
}

fn not_loaded(path: &Path, what: &str, error: pem::Error) -> Error {
    match error {
        pem::Error::Io(error) => unusable(path, &error).because(error),
        pem::Error::NoItemsFound => unusable(path, format_args!("there is no {what} in it, in PEM")),
        pem::Error::MissingSectionEnd { end_marker } => {
            let end = end_marker.escape_ascii();
            unusable(path, format_args!("it is cut off: no line `-----END {end}-----` ends the {what}"))
        }
        pem::Error::IllegalSectionStart { line } => {
            let line = line.trim_ascii().escape_ascii();
            unusable(path, format_args!("no {what} can be read: the line `{line}` begins nothing"))
        }
        error => unusable(path, format_args!("no {what} can be read: {error}")).because(error),
    }
}

/// The certificates of a PEM file, of which there is at least one.
fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |error| not_loaded(path, "certificate", error);
    let certificates = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(none) if none.is_empty() => Err(failed(pem::Error::NoItemsFound)),
        certificates => certificates.map_err(failed),
    }
}

fn load_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| match std::fs::read(path) {
        Ok(bytes) if is_encrypted(&bytes) => unusable(
            path,
            "the private key in it is encrypted, and nobody is asked for a passphrase: `openssl pkey` writes it without one",
        ),
        _ => not_loaded(path, "private key", error),
    })
}

/// Whether a private key in PEM is encrypted, by PKCS #8 or in the way that came before it.
fn is_encrypted(bytes: &[u8]) -> bool {
    let has = |words: &[u8]| bytes.windows(words.len()).any(|window| window == words);
    has(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || has(b"Proc-Type: 4,ENCRYPTED")
}

/// The authorities of a PEM file.
fn load_authorities(path: &Path) -> Result<Arc<RootCertStore>, Error> {
    let mut authorities = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        authorities.add(certificate).map_err(|error| unusable(path, format_args!("not an authority: {error}")))?;
    }
    Ok(Arc::new(authorities))
}
