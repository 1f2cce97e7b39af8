//! Who the peer has proved to be. Knows nothing of how it did so.

use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

/// Who the peer of a TLS connection has proved to be: what its certificate says, which was verified. Cheap to clone.
///
/// On a listener it is that of the client, if the listener demands certificates (`TlsServer::client_ca`); on a dialled
/// connection that of the server.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity(Arc<Inside>);

#[derive(PartialEq, Eq, Hash)]
struct Inside {
    certificate: Box<[u8]>,
    subject: Box<[u8]>,
    names: Vec<String>,
}

impl PeerIdentity {
    /// `subject` is in DER, as in the certificate; `names` are its alternative names.
    #[cfg(feature = "__tls")]
    pub(crate) fn new(certificate: &[u8], subject: &[u8], names: Vec<String>) -> PeerIdentity {
        PeerIdentity(Arc::new(Inside { certificate: certificate.into(), subject: subject.into(), names }))
    }

    /// The certificate, in DER: for whatever else is to be read in it.
    pub fn certificate(&self) -> &[u8] {
        &self.0.certificate
    }

    /// The alternative names of its subject that are DNS names, and then those that are URIs, as SPIFFE's. Those of other
    /// kinds are only in the [certificate](Self::certificate).
    pub fn names(&self) -> &[String] {
        &self.0.names
    }

    /// Who it is, which a newer certificate does not change; unless it says nothing of who, and stands for itself alone.
    pub(crate) fn who(&self) -> impl Hash {
        let Inside { certificate, subject, names } = &*self.0;
        let is_nameless = subject.is_empty() && names.is_empty();
        (subject, names, is_nameless.then_some(certificate))
    }
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerIdentity").field("names", &self.0.names).finish_non_exhaustive()
    }
}
