//! How far it is, for a person at a terminal: a bar or a rate line on standard error that is redrawn in place.
//!
//! Drawn by a thread of its own from counters that others keep, so watching costs a message nothing. Where standard error
//! is not a terminal nothing is drawn at all.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};

/// How often a line is drawn anew.
const TICK: Duration = Duration::from_millis(250);

/// How often in a second, at the most, where a bar moves by itself.
const MOST_OFTEN: u8 = 20;

/// What has gone through so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

/// A line with the rate at which `totals` grow, and what `state` has to say. `totals` is told the bar's position.
///
/// With a `length`, in bytes, there is a bar as well; [`ProgressBar::wrap_read`] moves it, or [`follow`]. It is for
/// [`Report::share_with`](crate::report::Report::share_with), before which it must not be moved.
pub(crate) fn line<S: std::fmt::Display>(
    length: Option<u64>,
    totals: impl Fn(u64) -> Totals + Send + Sync + 'static,
    state: impl Fn() -> S + Send + Sync + 'static,
) -> ProgressBar {
    let template = match length {
        Some(_) => "{wide_bar} {percent}% of {binary_total_bytes}  {rate}",
        None => "{spinner} {rate}",
    };
    let watched = Arc::new((Mutex::new(Meter::new(Instant::now())), totals, state));
    let rate = move |bar: &ProgressState, out: &mut dyn std::fmt::Write| {
        let (meter, totals, state) = &*watched;
        let totals = totals(bar.pos());
        let rate = meter.lock().map(|mut meter| meter.rate(totals, Instant::now())).unwrap_or_default();
        // A drawing that fails is a line less to look at.
        let _ = write!(out, "{}  {rate}{}", Amount(totals), state());
    };
    let style = ProgressStyle::with_template(template).expect("a template of ours").with_key("rate", rate);
    let terminal = Term::buffered_stderr();
    let target = match terminal.is_term() {
        true => ProgressDrawTarget::term_like_with_hz(
            Box::new(CursorFirst { terminal, is_behind: AtomicBool::new(false) }),
            MOST_OFTEN,
        ),
        false => ProgressDrawTarget::hidden(),
    };
    ProgressBar::with_draw_target(length, target).with_style(style)
}

/// Draws the line from now on.
pub(crate) fn start(bar: &ProgressBar) {
    if !bar.is_hidden() {
        bar.enable_steady_tick(TICK);
    }
}

/// Moves a bar to where `position` is, for as long as it is drawn, and never back.
pub(crate) fn follow(bar: &ProgressBar, position: impl Fn() -> u64 + Send + 'static) {
    if bar.is_hidden() {
        return;
    }
    let bar = bar.clone();
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(TICK);
        while !bar.is_finished() {
            bar.set_position(position().max(bar.position()));
            ticks.tick().await;
        }
    });
}

/// A terminal whose cursor waits at the beginning of what was drawn. Behind its end, where it waits otherwise, what the
/// terminal itself shows, such as `^C`, goes to the next line, and what was drawn stays above it for good.
#[derive(Debug)]
struct CursorFirst {
    terminal: Term,
    /// Something was drawn behind which the cursor is.
    is_behind: AtomicBool,
}

impl TermLike for CursorFirst {
    fn width(&self) -> u16 {
        self.terminal.width()
    }

    fn height(&self) -> u16 {
        self.terminal.height()
    }

    fn move_cursor_up(&self, lines: usize) -> io::Result<()> {
        self.terminal.move_cursor_up(lines)
    }

    fn move_cursor_down(&self, lines: usize) -> io::Result<()> {
        self.terminal.move_cursor_down(lines)
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        self.terminal.move_cursor_right(columns)
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        self.terminal.move_cursor_left(columns)
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.terminal.write_line(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.is_behind.store(true, Ordering::Relaxed);
        self.terminal.write_str(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.terminal.clear_line()
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_behind.swap(false, Ordering::Relaxed) {
            self.terminal.write_str("\r")?;
        }
        self.terminal.flush()
    }
}

/// A count of messages and bytes, for reading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount(pub(crate) Totals);

impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Totals { messages, bytes } = self.0;
        let what = if messages == 1 { "message" } else { "messages" };
        write!(f, "{} {what}, {}", HumanCount(messages), indicatif::BinaryBytes(bytes))
    }
}

/// A rate, for reading.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rate {
    messages_per_second: f64,
    bytes_per_second: f64,
}

impl Rate {
    pub(crate) fn over(totals: Totals, time: Duration) -> Rate {
        let seconds = time.as_secs_f64().max(f64::MIN_POSITIVE);
        Rate { messages_per_second: totals.messages as f64 / seconds, bytes_per_second: totals.bytes as f64 / seconds }
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let messages = HumanCount(self.messages_per_second.round() as u64);
        write!(f, "{messages} msg/s, {}/s", indicatif::BinaryBytes(self.bytes_per_second.round() as u64))
    }
}

/// The rate of the last second or so, from totals that only grow.
#[derive(Debug)]
struct Meter {
    since: Instant,
    then: Totals,
    rate: Rate,
}

impl Meter {
    fn new(now: Instant) -> Meter {
        Meter { since: now, then: Totals::default(), rate: Rate::default() }
    }

    fn rate(&mut self, totals: Totals, now: Instant) -> Rate {
        let time = now.saturating_duration_since(self.since);
        if time >= Duration::from_secs(1) {
            let grown =
                Totals { messages: totals.messages - self.then.messages, bytes: totals.bytes - self.then.bytes };
            *self = Meter { since: now, then: totals, rate: Rate::over(grown, time) };
        }
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let rate = |meter: &mut Meter, messages, time| {
            meter.rate(Totals { messages, bytes: messages * 10 }, time).messages_per_second
        };
        assert_eq!(rate(&mut meter, 500, at(500)), 0.0);
        assert_eq!(rate(&mut meter, 1000, at(1000)), 1000.0);
        assert_eq!(rate(&mut meter, 1100, at(1500)), 1000.0);
        assert_eq!(rate(&mut meter, 3000, at(3000)), 1000.0);
        assert_eq!(rate(&mut meter, 3000, at(4000)), 0.0);
    }
}
