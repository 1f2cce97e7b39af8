//! What stands in for TLS in a library that is built without it: types of which there are no values, so that nothing
//! around them has to ask how it was built.

use super::{Address, Transport};
use crate::error::Error;

#[derive(Clone, Debug)]
pub(crate) enum TlsServer {}

impl TlsServer {
    pub(crate) async fn accept(&self, _: Transport) -> Result<Transport, (String, Transport)> {
        match *self {}
    }
}

#[derive(Clone, Debug)]
pub(crate) enum TlsClient {}

impl TlsClient {
    pub(crate) fn check(&self, _: &Address) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) async fn connect(&self, _: Transport, _: &Address) -> Result<Transport, Error> {
        match *self {}
    }
}
