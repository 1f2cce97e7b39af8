//! The `--tls` options of those who listen and of those who dial.

use std::path::PathBuf;

use buffstreams::{Address, Error, ErrorKind, TlsClient, TlsServer};
use clap::Args;

use super::unusable::Unusable;

/// TLS for `listen`.
#[derive(Debug, Args)]
pub(crate) struct ListenTls {
    /// Speak TLS, with this certificate in PEM, and those behind it that link it to its authority
    ///
    /// At SIGHUP all files of TLS are read again. Connections that are open go on as they are. If the signal comes because
    /// the terminal was closed, the program ends in order instead, unless it was started with `nohup`.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Demand a certificate of every sender, of one of the authorities in this file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
}

impl ListenTls {
    pub(crate) fn server(&self) -> Result<Option<TlsServer>, Error> {
        let ListenTls { tls_cert: Some(chain), tls_key: Some(key), tls_ca } = self else { return Ok(None) };
        let server = TlsServer::from_pem_files(chain, key)?;
        match tls_ca {
            Some(authorities) => server.client_ca(authorities).map(Some),
            None => Ok(Some(server)),
        }
    }
}

/// TLS for those who dial.
#[derive(Debug, Args)]
pub(crate) struct SendTls {
    /// Speak TLS; the listener's certificate must be of an authority that the system believes
    #[arg(long)]
    tls: bool,

    /// Speak TLS; the listener's certificate must be of one of the authorities in this file
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// With TLS, the name that the listener's certificate must be for [default: the host of its address]
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,

    /// With TLS, the own certificate in PEM, for listeners that demand one
    ///
    /// At SIGHUP all files of TLS are read again, for the next connection.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl SendTls {
    /// # Errors
    ///
    /// An option is there that needs TLS, and TLS is not; or the name cannot be one for these addresses.
    pub(crate) fn check(&self, addresses: &[Address]) -> Result<(), Unusable> {
        if !self.is_on() {
            if self.tls_name.is_some() || self.tls_cert.is_some() {
                let reason = "--tls-name and --tls-cert are for TLS: add --tls or --tls-ca FILE";
                return Err(Unusable::lacking(&["tls-name", "tls-cert", "tls-key"], reason));
            }
            return Ok(());
        }
        match &self.tls_name {
            None if addresses.iter().any(|address| matches!(address, Address::Unix(_))) => {
                Err(Unusable::because("a path is no name that a certificate could be for: add --tls-name NAME"))
            }
            None => Ok(()),
            // What is wrong with the authorities is told where they are used.
            Some(name) => match self.authorities().and_then(|client| client.server_name(name)) {
                Err(error) if error.kind() == ErrorKind::InvalidConfiguration => Err(Unusable::because(error)),
                _ => Ok(()),
            },
        }
    }

    /// `None` without TLS.
    pub(crate) fn client(&self) -> Result<Option<TlsClient>, Error> {
        if !self.is_on() {
            return Ok(None);
        }
        let mut client = self.authorities()?;
        if let (Some(chain), Some(key)) = (&self.tls_cert, &self.tls_key) {
            client = client.certificate(chain, key)?;
        }
        match &self.tls_name {
            Some(name) => client.server_name(name).map(Some),
            None => Ok(Some(client)),
        }
    }

    fn is_on(&self) -> bool {
        self.tls || self.tls_ca.is_some()
    }

    fn authorities(&self) -> Result<TlsClient, Error> {
        match &self.tls_ca {
            Some(authorities) => TlsClient::with_ca_file(authorities),
            None => TlsClient::with_system_roots(),
        }
    }
}
