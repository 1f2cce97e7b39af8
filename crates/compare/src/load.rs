//! What the two workers of a run have to do, and what the receiver must have seen at the end. It says nothing of how.
//!
//! Before the clock starts, every connection carries a few messages (`hello`): then all is connected, and warm.

use serde::{Deserialize, Serialize};

use crate::note;

/// The first and the last byte of every message; the receiver reads both.
pub(crate) const FIRST: u8 = 0xa5;
pub(crate) const LAST: u8 = 0x5a;

/// Connections that are opened before memory is first weighed, so that what a process needs but once is not counted.
const FIRST_IDLE: u64 = 64;

/// Round trips before those that count.
const FIRST_ROUNDS: u64 = 1_000;

/// The kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// Messages of bytes, one way, as fast as they go.
    Stream,
    /// Protobuf messages, one way: encoded by the sender, decoded by the receiver.
    Notes,
    /// One message there and back, again and again.
    PingPong,
    /// Many connections, one message on each, then silence.
    Idle,
}

/// One run's work.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) work: Work,
    /// Bytes of a message.
    pub(crate) size: usize,
    pub(crate) connections: usize,
    /// Tasks that share each connection.
    pub(crate) tasks: usize,
    /// Messages that count, over all connections; round trips of a ping-pong.
    pub(crate) messages: u64,
    /// Messages that the sender sends too many, to see that it is noticed.
    pub(crate) miscount: i64,
}

/// What a receiver has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) messages: u64,
    /// Bytes of those messages, without prefixes. Of protobuf messages, the bytes of their strings.
    pub(crate) bytes: u64,
    /// The sum of the first and the last byte of every message.
    pub(crate) touched: u64,
}

impl Load {
    /// A stream of messages of `size` bytes over one connection, from one task.
    pub(crate) fn stream(size: usize, messages: u64) -> Load {
        Load { work: Work::Stream, size, connections: 1, tasks: 1, messages, miscount: 0 }
    }

    /// The messages that are sent before the clock starts, over all connections.
    pub(crate) fn hello(&self) -> u64 {
        match self.work {
            Work::Stream | Work::Notes => self.connections as u64,
            Work::PingPong => FIRST_ROUNDS,
            Work::Idle => FIRST_IDLE,
        }
    }

    /// The messages that a connection carries after its hello.
    pub(crate) fn share(&self) -> u64 {
        match self.work {
            Work::Stream | Work::Notes => self.messages / self.connections as u64,
            Work::PingPong => self.messages,
            Work::Idle => 0,
        }
    }

    /// What the sender sends on a connection after its hello.
    pub(crate) fn sent_share(&self, connection: usize) -> u64 {
        let miscount = if connection == 0 { self.miscount } else { 0 };
        self.share().saturating_add_signed(miscount)
    }

    /// All that the sender sends after the hello.
    pub(crate) fn sent_messages(&self) -> u64 {
        self.messages.saturating_add_signed(self.miscount)
    }

    /// The part of a connection's share that falls to one of its tasks.
    pub(crate) fn task_share(&self, connection: usize, task: usize) -> u64 {
        let share = self.sent_share(connection);
        let tasks = self.tasks as u64;
        share / tasks + u64::from((task as u64) < share % tasks)
    }

    /// A message.
    pub(crate) fn message(&self) -> Vec<u8> {
        let mut message = vec![7; self.size];
        if let Some(first) = message.first_mut() {
            *first = FIRST;
        }
        if let Some(last) = message.last_mut() {
            *last = LAST;
        }
        message
    }

    /// What the receiver must have seen at the end.
    pub(crate) fn expected(&self) -> Seen {
        let messages = self.hello() + self.messages;
        let (length, touched) = match self.work {
            Work::Notes => note::seen(note::NAME, note::COMMENT),
            _ => (self.size, u64::from(FIRST) + u64::from(LAST)),
        };
        Seen { messages, bytes: messages * length as u64, touched: messages * touched }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tasks_of_a_connection_send_its_share() {
        let load = Load { tasks: 4, connections: 2, miscount: -1, ..Load::stream(110, 2_006) };
        assert_eq!((0..4).map(|task| load.task_share(0, task)).sum::<u64>(), 1_002);
        assert_eq!((0..4).map(|task| load.task_share(1, task)).sum::<u64>(), 1_003);
    }

    #[test]
    fn a_message_of_one_byte_has_the_last_byte() {
        assert_eq!(Load::stream(1, 1).message(), [LAST]);
    }
}
