//! Who a listener refused, in words.

use std::fmt;

use buffstreams::ReceivedStats;

use crate::report::counted;

/// How many connections were refused, and why; nothing if none was.
pub(crate) struct Refusals(pub(crate) ReceivedStats);

impl Refusals {
    pub(crate) fn are_any(&self) -> bool {
        self.0.refused > 0
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons = [
            (self.0.refused_not_allowed, "not allowed"),
            (self.0.refused_too_many, "too many"),
            (self.0.refused_from_address, "too many from one address"),
            (self.0.refused_handshakes, "too many TLS handshakes"),
            (self.0.refused_stopping, "too late"),
        ];
        write!(f, "refused {}", counted(self.0.refused, "connection", "connections"))?;
        let some = reasons.into_iter().filter(|(count, _)| *count > 0);
        for (index, (count, reason)) in some.enumerate() {
            write!(f, "{}{count} {reason}", if index == 0 { ": " } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_by_their_reasons() {
        assert!(!Refusals(ReceivedStats::default()).are_any());
        let mut stats = ReceivedStats::default();
        (stats.refused, stats.refused_too_many, stats.refused_stopping) = (3, 2, 1);
        assert_eq!(Refusals(stats).to_string(), "refused 3 connections: 2 too many, 1 too late");
    }
}
