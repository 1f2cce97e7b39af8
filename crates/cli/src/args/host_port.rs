//! How an address of metrics is written.

use std::fmt;
use std::str::FromStr;

use buffstreams::Address;

/// Where metrics are: a host, or none, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// Empty for every interface, or for this machine.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<HostPort, String> {
        // As it is written in a browser.
        let text = text.strip_prefix("http://").unwrap_or(text).trim_end_matches("/metrics").trim_end_matches('/');
        match text.parse::<Address>() {
            Ok(Address::Tcp { host, port }) => Ok(HostPort { host, port }),
            _ if text.parse::<u16>().is_ok() => Err(format!("it is a port alone: write :{text}, or host:{text}")),
            _ => {
                Err("metrics are served over TCP: write host:port, or :port, with an IPv6 address in brackets"
                    .to_owned())
            }
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HostPort { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}
