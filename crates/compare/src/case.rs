//! What is measured: each case with its question, its unit, and the systems that take part, with how much they send.
//!
//! The counts are chosen so that a run of the raw socket takes half a second or so on two cores, where that is
//! possible.

use crate::load::{Load, Work};
use crate::system::{self, System};

/// What a case's figures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    MessagesPerSecond,
    BytesPerSecond,
    /// Of a round trip: the median in the row of the case, and the 99th percentile in another.
    Microseconds,
    BytesPerConnection,
}

impl Unit {
    /// Its name in the JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::MessagesPerSecond => "msg/s",
            Unit::BytesPerSecond => "bytes/s",
            Unit::Microseconds => "us",
            Unit::BytesPerConnection => "bytes/connection",
        }
    }

    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, Unit::MessagesPerSecond | Unit::BytesPerSecond)
    }
}

/// A case, or a point of a curve.
pub(crate) struct Case {
    pub(crate) name: String,
    /// The curve of which it is a point, with where it lies on it.
    pub(crate) curve: Option<(Curve, usize)>,
    pub(crate) title: String,
    /// For someone who has never heard of any of this.
    pub(crate) question: &'static str,
    pub(crate) unit: Unit,
    pub(crate) lanes: Vec<Lane>,
}

/// A curve, drawn from many cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Curve {
    Sizes,
    Connections,
}

impl Curve {
    /// The name of its group of cases on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Curve::Sizes => "sizes",
            Curve::Connections => "connections",
        }
    }
}

/// A system's part in a case.
pub(crate) struct Lane {
    /// The system's name in the report, where one system takes part in two ways.
    pub(crate) name: &'static str,
    pub(crate) system: &'static System,
    pub(crate) load: Load,
}

/// In this case, `buffstreams` with one task instead of several, to be compared with.
pub(crate) const ONE_TASK: &str = "buffstreams-1-task";

const LIBRARIES: [&str; 3] = ["raw", "buffstreams", "tokio-codec"];
const ALL: [&str; 8] =
    ["raw", "buffstreams", "tokio-codec", "tokio-codec-send", "protosocket", "protosocket-channel", "zeromq", "tonic"];
const TYPED: [&str; 7] =
    ["buffstreams", "buffstreams-prost", "tokio-codec", "protosocket", "protosocket-channel", "zeromq", "tonic"];

/// Messages of this size or less cost a slow system more than a fast one; larger ones cost all about the same.
const SMALL: usize = 4 * 1024;

const MIB: usize = 1024 * 1024;

/// All cases; the main ones only, with less to do, if `quick`.
pub(crate) fn cases(quick: bool, scale: f64) -> Vec<Case> {
    let count = |full: u64, quickly: u64| {
        let count = if quick { quickly } else { full };
        ((count as f64 * scale) as u64).max(1)
    };
    let only = |quickly: &'static [&'static str], full: &'static [&'static str]| if quick { quickly } else { full };
    let mut cases = vec![
        Case::new("p1", "Small messages, one connection", Unit::MessagesPerSecond)
            .asks(
                "One task sends messages of 110 bytes, one call for each; the receiver looks at every one. How many \
                 arrive in a second?",
            )
            .lanes(&ALL, Load::stream(110, count(15_000_000, 5_000_000))),
        Case::new("p2", "Small messages, 16 connections", Unit::MessagesPerSecond)
            .asks("The same over 16 connections at a time, each with a task of its own.")
            .lanes(only(&LIBRARIES, &ALL), Load { connections: 16, ..Load::stream(110, count(16_000_000, 5_000_000)) }),
        Case::new("p3", "Four tasks share a connection", Unit::MessagesPerSecond)
            .asks("Four tasks send at the same time over one connection. What does sharing cost?")
            .lanes(&["raw"], Load::stream(110, count(12_000_000, 4_000_000)))
            .lane(ONE_TASK, "buffstreams", Load::stream(110, count(12_000_000, 4_000_000)))
            .lanes(&["buffstreams"], Load { tasks: 4, ..Load::stream(110, count(12_000_000, 4_000_000)) }),
        Case::new("p4", "Tiny messages", Unit::MessagesPerSecond)
            .asks("Messages of 16 bytes: what a message costs when there is nearly nothing in it.")
            .lanes(only(&LIBRARIES, &ALL), Load::stream(16, count(30_000_000, 10_000_000))),
        Case::new("p5", "Large messages", Unit::BytesPerSecond)
            .asks("Messages of 1 MiB: how many bytes arrive in a second?")
            .lanes(only(&LIBRARIES, &ALL), Load::stream(MIB, count(2_500, 1_000))),
        Case::new("p6", "There and back", Unit::Microseconds)
            .asks(
                "A message of 110 bytes goes to the other process and comes back, one at a time. How long does that \
                 take? Shorter is better.",
            )
            .lanes(
                only(&LIBRARIES, &["raw", "buffstreams", "tokio-codec", "protosocket", "zeromq", "tonic"]),
                Load { work: Work::PingPong, ..Load::stream(110, count(40_000, 20_000)) },
            ),
    ];
    if !quick {
        let idle = count(9_000, 9_000);
        cases.extend([
            Case::new("p7", "Idle connections", Unit::BytesPerConnection)
                .asks(
                    "9,000 connections carry one message each and then fall silent. How much memory does the receiver \
                     keep for each? Less is better. (raw: a task with a 4 KiB buffer for each connection.)",
                )
                .lanes(
                    &["raw", "buffstreams", "tokio-codec", "protosocket", "tonic"],
                    Load { work: Work::Idle, connections: idle as usize, ..Load::stream(110, idle) },
                ),
            Case::new("p8", "Protocol Buffers", Unit::MessagesPerSecond)
                .asks(
                    "Protobuf messages of 110 bytes with three fields are encoded, sent and decoded, over one \
                     connection. (raw moves the same bytes and decodes nothing.)",
                )
                .lanes(&["raw"], Load::stream(110, count(12_000_000, 0)))
                .lanes(&TYPED, Load { work: Work::Notes, ..Load::stream(110, count(6_000_000, 0)) }),
            Case::new("p9", "Acknowledged messages", Unit::MessagesPerSecond)
                .asks("Messages of 110 bytes whose receiver says that its handler is done with them. What does that cost?")
                .lanes(&["raw", "buffstreams", "buffstreams-acked"], Load::stream(110, count(15_000_000, 0))),
            Case::new("p10", "Over TLS", Unit::MessagesPerSecond)
                .asks(
                    "Messages of 110 bytes over TLS 1.3, beside a bare TLS stream that moves the same bytes in large \
                     writes and looks at nothing. What do the messages cost there?",
                )
                .lanes(&["raw-tls", "buffstreams-tls"], Load::stream(110, count(8_000_000, 0))),
            Case::new("original", "The Go library's own benchmark", Unit::MessagesPerSecond)
                .asks("Sixteen senders to one listener, protobuf messages of 110 bytes, decoded on arrival.")
                .lanes(&["raw"], Load { connections: 16, ..Load::stream(110, count(12_000_000, 0)) })
                .lanes(&TYPED, Load { work: Work::Notes, connections: 16, ..Load::stream(110, count(6_400_000, 0)) }),
        ]);
        cases.extend((2..=12).map(|step| {
            let size = 4usize.pow(step);
            // At most 2 GiB, and at most 15 million messages.
            let messages = (2_048 * MIB / size).min(15_000_000);
            let load = Load::stream(size, count(messages as u64, 0));
            Case::point(Curve::Sizes, size, Unit::BytesPerSecond).lanes(&LIBRARIES, load).lanes(&["zeromq"], load)
        }));
        cases.extend((0..=6).map(|step| {
            let connections = 4usize.pow(step);
            let messages = count(8_192_000, 0).next_multiple_of(connections as u64);
            let load = Load { connections, ..Load::stream(110, messages) };
            Case::point(Curve::Connections, connections, Unit::MessagesPerSecond).lanes(&LIBRARIES, load)
        }));
    }
    cases
}

impl Case {
    fn new(name: &str, title: &str, unit: Unit) -> Case {
        Case { name: name.into(), curve: None, title: title.into(), question: "", unit, lanes: Vec::new() }
    }

    fn point(curve: Curve, at: usize, unit: Unit) -> Case {
        let (name, title) = match curve {
            Curve::Sizes => (format!("size-{at}"), format!("messages of {at} bytes, one connection")),
            Curve::Connections => (format!("connections-{at}"), format!("110-byte messages over {at} connections")),
        };
        Case { curve: Some((curve, at)), ..Case::new(&name, &title, unit) }
    }

    fn asks(mut self, question: &'static str) -> Case {
        self.question = question;
        self
    }

    fn lane(mut self, name: &'static str, system: &str, load: Load) -> Case {
        let system = system::find(system).expect("cases name systems of the list");
        let part = if load.size <= SMALL && load.work != Work::PingPong && load.work != Work::Idle {
            system.part
        } else {
            1.0
        };
        // Every connection has the same share.
        let messages = ((load.messages as f64 * part) as u64).next_multiple_of(load.connections as u64);
        self.lanes.push(Lane { name, system, load: Load { messages, ..load } });
        self
    }

    fn lanes(self, systems: &[&'static str], load: Load) -> Case {
        systems.iter().fold(self, |case, system| case.lane(system, system, load))
    }

    /// Whether it is meant by this name on the command line.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        // P11 is the processor time of the rows of P1.
        let name = if name == "p11" { "p1" } else { name };
        self.name == name || self.curve.is_some_and(|(curve, _)| curve.name() == name)
    }
}
