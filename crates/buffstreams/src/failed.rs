//! Where failed messages go: to a closure, into a channel, or into the log.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::log::Throttle;
use crate::proto::outbox::FailedMessage;
use crate::proto::session::wire::printable;
use crate::shared_outbox::SharedOutbox;

/// The owner of messages that were given up.
#[derive(Clone, Default)]
pub(crate) enum FailedTo {
    /// Nobody: logged and counted.
    #[default]
    Log,
    Call(Arc<dyn Fn(FailedMessage) + Send + Sync>),
    Channel(mpsc::Sender<FailedMessage>),
    /// The spool, which takes them when it is told that there is something.
    #[cfg_attr(not(feature = "spool"), allow(dead_code))]
    Spool(Arc<dyn Fn() + Send + Sync>),
}

impl fmt::Debug for FailedTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailedTo::Log => "Log",
            FailedTo::Call(_) => "Call",
            FailedTo::Channel(_) => "Channel",
            FailedTo::Spool(_) => "Spool",
        })
    }
}

impl FailedTo {
    /// Hands over every failed message that waits. One that cannot be handed over stays where it is, and takes room.
    ///
    /// Cancel safe.
    pub(crate) async fn hand_over(&self, outbox: &SharedOutbox, log: &Throttle) {
        if let FailedTo::Channel(channel) = self {
            while outbox.has_failed() {
                let Ok(place) = channel.reserve().await else { break };
                if let Some(failed) = outbox.take_failed() {
                    place.send(failed);
                }
            }
        }
        self.hand_over_now(outbox, log);
    }

    /// Tells the owner of a failed message that is kept elsewhere. A channel that is full is not told.
    #[cfg(feature = "spool")]
    pub(crate) fn tell(&self, failed: FailedMessage, log: &Throttle) {
        match self {
            FailedTo::Call(call) => call_with(call, failed, log),
            FailedTo::Channel(channel) => {
                use mpsc::error::TrySendError::{Closed, Full};
                if let Err(Full(failed) | Closed(failed)) = channel.try_send(failed) {
                    log_kept(&failed, log);
                }
            }
            FailedTo::Log | FailedTo::Spool(_) => log_kept(&failed, log),
        }
    }

    /// Whether failed messages are taken by somebody who was told.
    pub(crate) fn is_told(&self) -> bool {
        matches!(self, FailedTo::Spool(_))
    }

    /// The same as far as it can be done without waiting.
    pub(crate) fn hand_over_now(&self, outbox: &SharedOutbox, log: &Throttle) {
        if let FailedTo::Spool(wake) = self {
            return wake();
        }
        while outbox.has_failed() {
            match self {
                FailedTo::Channel(channel) => match channel.try_reserve() {
                    Ok(place) => {
                        let Some(failed) = outbox.take_failed() else { return };
                        place.send(failed);
                    }
                    Err(mpsc::error::TrySendError::Full(())) => return,
                    Err(mpsc::error::TrySendError::Closed(())) => log_failed(outbox, log),
                },
                FailedTo::Call(call) => {
                    let Some(failed) = outbox.take_failed() else { return };
                    call_with(call, failed, log);
                }
                FailedTo::Log => log_failed(outbox, log),
                FailedTo::Spool(_) => return,
            }
        }
    }
}

fn call_with(call: &Arc<dyn Fn(FailedMessage) + Send + Sync>, failed: FailedMessage, log: &Throttle) {
    let number = failed.number;
    if catch_unwind(AssertUnwindSafe(|| call(failed))).is_err() {
        log.warn(|left_out| tracing::error!(number, left_out, "the owner of a failed message panicked"));
    }
}

#[cfg(feature = "spool")]
fn log_kept(failed: &FailedMessage, log: &Throttle) {
    let FailedMessage { number, reason, .. } = failed;
    log.warn(|left_out| tracing::warn!(number, left_out, "message failed, and is kept: {reason}"));
}

fn log_failed(outbox: &SharedOutbox, log: &Throttle) {
    if let Some(failed) = outbox.take_failed() {
        let FailedMessage { number, message, reason, rejection, attempts, age } = failed;
        let bytes = message.len();
        let said = rejection.map(|rejection| printable(&rejection.text));
        log.warn(|left_out| tracing::warn!(number, bytes, attempts, ?age, said, left_out, "message failed: {reason}"));
    }
}
