//! The place of metrics in a build without them: meters that count nothing.

use crate::stats::{ReceivedStats, Stats};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Listener,
    Connection,
}

#[derive(Clone, Copy, Debug, Default)]
#[expect(dead_code, reason = "nobody asks")]
pub(crate) struct Totals {
    pub(crate) received: ReceivedStats,
    pub(crate) sent: Stats,
    pub(crate) is_up: bool,
    pub(crate) is_stalled: bool,
}

#[cfg(feature = "spool")]
#[derive(Clone, Copy, Debug, Default)]
#[expect(dead_code, reason = "nobody asks")]
pub(crate) struct SpoolTotals {
    pub(crate) bytes: u64,
    pub(crate) failed: u64,
    pub(crate) capacity: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Meter;

impl Meter {
    pub(crate) fn new(_: Role, _: &str, _: impl Fn() -> Totals + Send + Sync + 'static) -> Meter {
        Meter
    }

    #[cfg(feature = "spool")]
    pub(crate) fn watch_spool(&self, _: impl Fn() -> SpoolTotals + Send + Sync + 'static) {}

    pub(crate) fn publish(&self) {}
}
