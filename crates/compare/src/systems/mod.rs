//! How each system is used, one a file: its settings with the page that advises them, its receiver and its sender.

pub(crate) mod buffstreams;
#[cfg(feature = "protosocket")]
pub(crate) mod protosocket;
pub(crate) mod raw;
pub(crate) mod raw_tls;
pub(crate) mod tokio_codec;
#[cfg(feature = "tonic")]
pub(crate) mod tonic;
#[cfg(feature = "zeromq")]
pub(crate) mod zeromq;
