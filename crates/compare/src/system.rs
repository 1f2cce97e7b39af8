//! The systems that are compared: their names, versions and settings, and who plays their two ends.
//!
//! A system that this program was built without keeps its place in the list, so that a report can say that it is
//! absent.

use std::net::SocketAddr;

use futures_util::future::BoxFuture;

use crate::Result;
use crate::load::Load;
use crate::systems::{buffstreams, raw, raw_tls, tokio_codec};
use crate::tally::Tally;
use crate::worker::{Done, Gate, Receiving};

/// The two ends of a system. Both are called in a tokio runtime with many workers, whether they use it or not.
pub(crate) trait Runner: Sync {
    /// Begins to receive: counts every message with a counter of the tally, which it drops when the connection ends.
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>>;

    /// Opens the connections, says hello on each, passes the gate, and sends; returns when nothing is left to send.
    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>>;
}

/// A system, present or not.
pub(crate) struct System {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) version: fn() -> String,
    /// How it is set up, and where its documentation says so.
    pub(crate) settings: &'static str,
    /// The part of a case's messages that it sends when they are small, so that slow systems do not take minutes.
    pub(crate) part: f64,
    /// Whether it looks at each message, so that the sum of what was touched can be checked.
    pub(crate) reads_messages: bool,
    /// `None` if it was not built in: `feature` brings it.
    pub(crate) runner: Option<&'static dyn Runner>,
    pub(crate) feature: &'static str,
}

/// All of them, in the order of a report.
pub(crate) static SYSTEMS: &[System] = &[
    raw::SYSTEM,
    buffstreams::SYSTEM,
    buffstreams::PROST,
    buffstreams::ACKED,
    buffstreams::TLS,
    raw_tls::SYSTEM,
    tokio_codec::SYSTEM,
    tokio_codec::EACH,
    PROTOSOCKET,
    PROTOSOCKET_CHANNEL,
    ZEROMQ,
    TONIC,
];

/// The system of this name.
pub(crate) fn find(name: &str) -> Option<&'static System> {
    SYSTEMS.iter().find(|system| system.name == name)
}

#[cfg(feature = "protosocket")]
use crate::systems::protosocket::{CHANNEL as PROTOSOCKET_CHANNEL, SYSTEM as PROTOSOCKET};
#[cfg(feature = "tonic")]
use crate::systems::tonic::SYSTEM as TONIC;
#[cfg(feature = "zeromq")]
use crate::systems::zeromq::SYSTEM as ZEROMQ;

#[cfg(not(feature = "protosocket"))]
const PROTOSOCKET: System = absent("protosocket", "protosocket");
#[cfg(not(feature = "protosocket"))]
const PROTOSOCKET_CHANNEL: System = absent("protosocket-channel", "protosocket");
#[cfg(not(feature = "tonic"))]
const TONIC: System = absent("tonic", "tonic");
#[cfg(not(feature = "zeromq"))]
const ZEROMQ: System = absent("zeromq", "zeromq");

#[cfg(not(all(feature = "protosocket", feature = "tonic", feature = "zeromq")))]
const fn absent(name: &'static str, feature: &'static str) -> System {
    System {
        name,
        about: "",
        version: String::new,
        settings: "",
        part: 1.0,
        reads_messages: true,
        runner: None,
        feature,
    }
}
