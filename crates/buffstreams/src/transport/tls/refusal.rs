//! Words for handshakes that failed: what was seen, and what would have been right.

use std::io;

use rustls::pki_types::CertificateDer;
use rustls::{AlertDescription, CertificateError};

/// What went wrong, seen from this side.
pub(super) fn words(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => alert_words(*alert),
        Some(rustls::Error::InvalidCertificate(error)) => format!("the peer's certificate {}", fault(error)),
        Some(rustls::Error::NoCertificatesPresented) => "the peer has shown no certificate, and one is demanded".into(),
        Some(rustls::Error::InvalidMessage(error)) => format!("what the peer sends is not TLS ({error:?})"),
        Some(rustls::Error::PeerIncompatible(what)) => {
            format!("the peer speaks another TLS than 1.3, or in other ciphers ({what:?})")
        }
        Some(error) => error.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the peer ended the connection; it may not speak TLS, or not want this side's certificate".into()
        }
        None => error.to_string(),
    }
}

/// The peer says what it does not like about this side.
fn alert_words(alert: AlertDescription) -> String {
    let what = match alert {
        AlertDescription::UnknownCA => "it does not know the authority of this side's certificate",
        AlertDescription::CertificateRequired => "it demands a certificate of this side, and was shown none",
        AlertDescription::CertificateExpired => "this side's certificate has expired, or is not valid yet",
        AlertDescription::BadCertificate => "this side's certificate is not for the name it wants, or not sound",
        AlertDescription::ProtocolVersion => "it does not speak TLS 1.3, which this side does",
        _ => return format!("the peer refused the handshake ({alert:?})"),
    };
    format!("the peer refused the handshake: {what} ({alert:?})")
}

/// A name without what it is called in the code, as in `DnsName("localhost")`.
fn bare(name: &str) -> &str {
    name.split_once('(').map_or(name, |(_, rest)| rest.trim_end_matches(')').trim_matches('"'))
}

/// What is wrong with a certificate, to follow "the certificate".
fn fault(error: &CertificateError) -> String {
    match error {
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented = if presented.is_empty() {
                "no name".into()
            } else {
                presented.iter().map(|name| bare(name)).collect::<Vec<_>>().join(", ")
            };
            format!("is for {presented}, and should be for {}", expected.to_str())
        }
        CertificateError::ExpiredContext { time, not_after } => {
            format!("has expired {} ago", since(time.as_secs().saturating_sub(not_after.as_secs())))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            format!("is not valid before {} from now", since(not_before.as_secs().saturating_sub(time.as_secs())))
        }
        CertificateError::UnknownIssuer => "is of an unknown authority".into(),
        CertificateError::Other(other) => match other.0.downcast_ref() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                "is that of an authority; one of a server or client has basicConstraints=CA:FALSE".into()
            }
            _ => format!("cannot be accepted: {}", other.0),
        },
        error => format!("cannot be accepted: {error}"),
    }
}

/// The same where more is known: the certificate, and where the authorities are from that it should be of.
pub(super) fn words_of(error: &io::Error, seen: Option<&CertificateDer<'_>>, authorities: &str) -> String {
    let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    if error.get_ref().and_then(|inner| inner.downcast_ref()) != Some(&unknown) {
        return words(error);
    }
    let issuer = match seen.and_then(|seen| webpki::EndEntityCert::try_from(seen).ok()) {
        Some(seen) => format!("the authority {:?}", text_of(seen.issuer())),
        None => "an authority".into(),
    };
    format!("the peer's certificate is of {issuer} that is none of {authorities}")
}

fn since(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// The texts in a distinguished name, joined. It is DER: each attribute is a set of a sequence of an identifier and a text.
fn text_of(mut name: &[u8]) -> String {
    let mut texts = Vec::new();
    while let Some((_, set, rest)) = value(name) {
        name = rest;
        let text = value(set).and_then(|(_, sequence, _)| value(sequence)).and_then(|(_, _, text)| value(text));
        texts.extend(text.map(|(_, text, _)| String::from_utf8_lossy(text).into_owned()));
    }
    texts.join(", ")
}

/// The first value: its tag, itself, and what follows.
fn value(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    Some((tag, rest.get(..length)?, rest.get(length..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_a_name_are_found_and_rubbish_ends_them() {
        // CN=rim, O=of
        let name = b"\x31\x0c\x30\x0a\x06\x03\x55\x04\x03\x0c\x03rim\x31\x0b\x30\x09\x06\x03\x55\x04\x0a\x13\x02of";
        assert_eq!(text_of(name), "rim, of");
        for cut in 0..name.len() {
            text_of(&name[..cut]);
        }
        assert_eq!(text_of(b"\x31\xff\xff\xff\xff\xff"), "");
    }
}
