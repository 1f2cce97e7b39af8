//! What is warned of again and again, as every attempt to connect while a peer is away: said at once where it is new, then at
//! growing pauses, with how often it came meanwhile. What is new is known by its words, so another reason is said at once,
//! and many connections to one peer that is away are told of as one is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// From the first time that something is said to the second; each pause is twice the one before, and none is longer than
/// the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What was not met for so long is new again.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// Warnings that are known at a time, at the most; what is beyond them is not held back.
const MOST: usize = 256;

/// The warnings of late.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    known: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    met: Instant,
    said: Instant,
    pause: Duration,
    /// How often it was met and not said.
    untold: u64,
}

impl Repeats {
    /// Says whether it is to be said now, and how often it came since it was said last; 0 if it is new.
    pub(crate) fn meet(&mut self, warning: &str, now: Instant) -> Option<u64> {
        let is_fresh = |known: &Known| now.saturating_duration_since(known.met) < FORGOTTEN;
        if let Some(known) = self.known.get_mut(warning).filter(|known| is_fresh(known)) {
            known.met = now;
            known.untold += 1;
            if now.saturating_duration_since(known.said) < known.pause {
                return None;
            }
            (known.said, known.pause) = (now, (2 * known.pause).min(LONGEST_PAUSE));
            return Some(std::mem::take(&mut known.untold));
        }
        if self.known.len() >= MOST {
            self.known.retain(|_, known| is_fresh(known));
        }
        if self.known.len() < MOST {
            let known = Known { met: now, said: now, pause: FIRST_PAUSE, untold: 0 };
            self.known.insert(warning.to_owned(), known);
        }
        Some(0)
    }

    /// What has come since it was said last, and how often. All of it is forgotten.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (String, u64)> + use<> {
        let known = std::mem::take(&mut self.known);
        known.into_iter().filter(|(_, known)| known.untold > 0).map(|(warning, known)| (warning, known.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When, in seconds, it was said what comes each second for so long, and with which count.
    fn said(repeats: &mut Repeats, warning: &str, start: Instant, seconds: std::ops::Range<u64>) -> Vec<(u64, u64)> {
        let meet = |second| Some((second, repeats.meet(warning, start + Duration::from_secs(second))?));
        seconds.filter_map(meet).collect()
    }

    #[test]
    fn what_comes_each_second_is_said_at_growing_pauses_with_how_often_it_came() {
        let (mut repeats, start) = (Repeats::default(), Instant::now());
        let told = said(&mut repeats, "refused", start, 0..200);
        assert_eq!(told, [(0, 0), (5, 5), (15, 10), (35, 20), (75, 40), (135, 60), (195, 60)]);
        assert_eq!(repeats.take().collect::<Vec<_>>(), [("refused".to_owned(), 4)]);
        assert_eq!(repeats.take().count(), 0);
    }

    #[test]
    fn another_reason_is_said_at_once_and_what_was_away_for_a_while_is_new() {
        let (mut repeats, start) = (Repeats::default(), Instant::now());
        said(&mut repeats, "refused", start, 0..100);
        assert_eq!(said(&mut repeats, "no answer", start, 100..102), [(100, 0)]);
        assert_eq!(said(&mut repeats, "refused", start, 102..103), [], "still known");
        assert_eq!(said(&mut repeats, "refused", start, 132..133), [(132, 0)]);
    }

    #[test]
    fn no_more_is_kept_than_a_bound_and_what_is_beyond_it_is_said() {
        let (mut repeats, start) = (Repeats::default(), Instant::now());
        for number in 0..2 * MOST {
            assert_eq!(repeats.meet(&number.to_string(), start), Some(0));
        }
        assert_eq!((repeats.known.len(), repeats.meet("0", start)), (MOST, None));
        assert_eq!(repeats.meet("last", start), Some(0));
        assert_eq!(repeats.meet("another", start + FORGOTTEN), Some(0));
        assert_eq!(repeats.known.len(), 1);
    }
}
