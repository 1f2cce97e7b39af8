//! What the program says on standard error: lines that are always said, and errors at a bounded rate.
//!
//! A stranger can cause any number of errors, so they are printed in a burst of 20 and then 20 a second, and those left
//! out are counted and the count is printed. What the library reports as `tracing` events of level WARN and above takes
//! the same way, unless it only says again what it said before (`repeats`). Bytes that came from elsewhere are escaped: a peer cannot write to the user's terminal.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use buffstreams::ErrorKind;
use indicatif::ProgressBar;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::repeats::Repeats;
use crate::{progress, shown};

const BURST: f64 = 20.0;
const PER_SECOND: f64 = 20.0;

/// How often, at most, errors are followed by a count of those left out.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// How long an end that waits for nothing waits for the terminal.
const MOMENT: Duration = Duration::from_millis(500);

/// The longest report of one error, in characters; a peer's words could be as long as its message.
const LONGEST: usize = 1000;

/// The one way to standard error.
#[derive(Debug)]
pub(crate) struct Report {
    limiter: Mutex<Limiter>,
    /// Of the library's warnings.
    repeats: Mutex<Repeats>,
    /// The kinds of errors, by their names, that attempts to connect have met.
    met: Mutex<BTreeSet<String>>,
    /// A bar that must be lifted while a line is written above it.
    bar: OnceLock<ProgressBar>,
}

impl Report {
    pub(crate) fn new() -> Arc<Report> {
        let limiter = Mutex::new(Limiter::new(Instant::now()));
        Arc::new(Report { limiter, repeats: Mutex::default(), met: Mutex::default(), bar: OnceLock::new() })
    }

    /// From now on this bar is drawn, and lines are written above it.
    pub(crate) fn share_with(&self, bar: ProgressBar) {
        // Not before lines know of it, or one could be written into it.
        self.bar.set(bar.clone()).expect("a program has one bar");
        progress::start(&bar);
    }

    /// Takes the bar away for good, and says how often the library's warnings came since they were said last.
    pub(crate) fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
        let untold = self.repeats().take();
        for (warning, times) in untold {
            let mut line = String::new();
            put_escaped(&again(&warning, times), &mut line);
            self.say(line);
        }
    }

    /// The same where nothing may be waited for: whatever has the terminal may be stuck in it, and the bar is then left there.
    pub(crate) fn finish_at_once(self: &Arc<Self>) {
        let (report, (done, is_done)) = (Arc::clone(self), mpsc::channel());
        let clear = move || {
            report.finish();
            let _ = done.send(());
        };
        if self.bar.get().is_some() && thread::Builder::new().name("clear".into()).spawn(clear).is_ok() {
            let _ = is_done.recv_timeout(MOMENT);
        }
    }

    /// Calls `write`, which writes to the same terminal, with the bar lifted.
    pub(crate) fn above_bar<T>(&self, write: impl FnOnce() -> T) -> T {
        match self.bar.get() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Writes a line, always.
    pub(crate) fn say(&self, line: impl fmt::Display) {
        self.write(format!("{line}\n"));
    }

    /// Writes why the program fails. Never left out: it is the last error, and the one that matters.
    pub(crate) fn fail(&self, error: impl fmt::Display) {
        let mut line = String::from("error: ");
        put_escaped(&error.to_string(), &mut line);
        self.say(line);
    }

    /// Writes an error, or counts it as left out.
    pub(crate) fn error(&self, error: impl fmt::Display) {
        self.limited("error", &error);
    }

    /// Writes something that a stranger can bring about, or counts it as left out.
    pub(crate) fn note(&self, line: impl fmt::Display) {
        self.limited("", &line);
    }

    fn limited(&self, word: &str, text: &dyn fmt::Display) {
        let now = Instant::now();
        let admission = self.limiter().admit(now);
        let left_out = match admission {
            Admission::LeftOut => return,
            Admission::Admitted { left_out_before } => left_out_before,
        };
        let mut lines = String::new();
        put_left_out(left_out, &mut lines);
        lines.push_str(word);
        if !word.is_empty() {
            lines.push_str(": ");
        }
        put_escaped(&text.to_string(), &mut lines);
        lines.push('\n');
        self.write(lines);
    }

    /// Says what to do next where no connection was ever of use.
    pub(crate) fn advise(&self) {
        let has_met = |kind: ErrorKind| self.met().contains(&format!("{kind:?}"));
        if has_met(ErrorKind::Tls) {
            self.say(
                "If it is about certificates: --tls-ca FILE says which authority to believe, --tls-name NAME for whom the \
                 listener's must be, and --tls-cert FILE with --tls-key FILE shows your own.",
            );
        } else if has_met(ErrorKind::Connect) {
            self.say("If there is no listener yet, start `buffstreams listen` there.");
        }
    }

    /// Writes what the library warns of, unless that has been said a short while ago.
    fn library(&self, warning: &str) {
        let times = self.repeats().meet(warning, Instant::now());
        match times {
            None => {}
            Some(0) => self.limited("", &warning),
            Some(times) => self.limited("", &again(warning, times)),
        }
    }

    /// Writes the count of the errors left out so far, if there are any. For the end, and for quiet moments.
    pub(crate) fn say_left_out(&self) {
        let mut line = String::new();
        put_left_out(self.limiter().take_left_out(Instant::now()), &mut line);
        if !line.is_empty() {
            self.write(line);
        }
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn repeats(&self) -> MutexGuard<'_, Repeats> {
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn met(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, lines: String) {
        // Standard error may be closed. There is then nobody to tell, and no reason to stop.
        self.above_bar(|| drop(io::stderr().lock().write_all(lines.as_bytes())));
    }
}

/// A number, and what there are so many of.
pub(crate) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// A number of bytes, in full.
pub(crate) fn bytes(number: usize) -> String {
    counted(number as u64, "byte", "bytes")
}

/// A warning that came so often since it was said last.
fn again(warning: &str, times: u64) -> String {
    format!("{warning} (and {} more)", counted(times, "time", "times"))
}

fn put_left_out(left_out: u64, lines: &mut String) {
    if left_out > 0 {
        let left_out = counted(left_out, "more was left out", "more were left out");
        writeln!(lines, "error: {left_out}").expect("a String takes everything");
    }
}

fn put_escaped(text: &str, line: &mut String) {
    for (index, char) in text.chars().enumerate() {
        if index == LONGEST {
            line.push('…');
            return;
        }
        shown::put_char(char, line);
    }
}

/// A bucket that holds a burst and fills at a steady rate.
#[derive(Debug)]
struct Limiter {
    room: f64,
    filled: Instant,
    left_out: u64,
    /// When the count was given last: it would be a flood of its own with every error.
    counted: Instant,
}

#[derive(Debug, PartialEq)]
enum Admission {
    Admitted { left_out_before: u64 },
    LeftOut,
}

impl Limiter {
    fn new(now: Instant) -> Limiter {
        Limiter { room: BURST, filled: now, left_out: 0, counted: now }
    }

    fn admit(&mut self, now: Instant) -> Admission {
        let since = now.saturating_duration_since(self.filled);
        self.room = (self.room + since.as_secs_f64() * PER_SECOND).min(BURST);
        self.filled = now;
        if self.room < 1.0 {
            self.left_out += 1;
            return Admission::LeftOut;
        }
        self.room -= 1.0;
        let is_time_to_count = now.saturating_duration_since(self.counted) >= COUNT_EVERY;
        Admission::Admitted { left_out_before: if is_time_to_count { self.take_left_out(now) } else { 0 } }
    }

    fn take_left_out(&mut self, now: Instant) -> u64 {
        self.counted = now;
        std::mem::take(&mut self.left_out)
    }
}

/// Passes the library's warnings and errors on to a [`Report`].
#[derive(Debug)]
pub(crate) struct LibraryEvents(pub(crate) Arc<Report>);

impl<S: Subscriber> Layer<S> for LibraryEvents {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        // The end of a connection is told by what listens, which hears of every one: the library's own line about it is
        // known by its count of unsent replies, and some of those lines have been left out before they come here.
        let is_end_of_connection = metadata.fields().field("unsent").is_some();
        *metadata.level() <= Level::WARN && metadata.target().starts_with("buffstreams") && !is_end_of_connection
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut sentence = Sentence::default();
        event.record(&mut sentence);
        // The library leaves out some of its own.
        self.0.limiter().left_out += sentence.left_out;
        let word = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        self.0.met().extend(sentence.kind.take());
        self.0.library(&format!("{word}: {sentence}"));
    }
}

/// An event as one line: what happened, then its fields.
#[derive(Default)]
struct Sentence {
    message: String,
    fields: String,
    left_out: u64,
    /// Of the error that it tells; its words say as much.
    kind: Option<String>,
}

impl Visit for Sentence {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "left_out" => self.left_out = value,
            _ => self.record_debug(field, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "kind" => return self.kind = Some(format!("{value:?}")),
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, "{}{name}={value:?}", if self.fields.is_empty() { "" } else { ", " }),
        };
        written.expect("a String takes everything");
    }
}

impl fmt::Display for Sentence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.message.as_str(), self.fields.as_str()) {
            (message, "") => f.write_str(message),
            ("", fields) => f.write_str(fields),
            (message, fields) => write!(f, "{message} ({fields})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_20_is_said_then_20_a_second_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let said = |limiter: &mut Limiter, at: Duration, tries: usize| {
            (0..tries).filter(|_| limiter.admit(start + at) != Admission::LeftOut).count()
        };
        assert_eq!(said(&mut limiter, Duration::ZERO, 1000), 20);
        assert_eq!(limiter.left_out, 980);

        let second: usize = (1..=19).map(|step| said(&mut limiter, Duration::from_millis(step * 51), 100)).sum();
        assert_eq!(second, 19);
        let left_out = 980 + 19 * 99;
        let admission = limiter.admit(start + Duration::from_millis(20 * 51));
        assert_eq!(admission, Admission::Admitted { left_out_before: left_out }, "once a second");

        assert_eq!(said(&mut limiter, Duration::from_secs(3600), 1000), 20, "a quiet hour saves up one burst, no more");
    }

    #[test]
    fn what_a_peer_says_cannot_move_the_cursor() {
        let mut line = String::new();
        put_escaped("a\x1b[2Jb\r\nc ü", &mut line);
        assert_eq!(line, "a\\u{1b}[2Jb\\r\\nc ü");
    }

    #[test]
    fn one_is_told_as_one() {
        let told = [0, 1, 2].map(|number| counted(number, "message goes", "messages go"));
        assert_eq!(told, ["0 messages go", "1 message goes", "2 messages go"]);
        let mut lines = String::new();
        (0..3).for_each(|left_out| put_left_out(left_out, &mut lines));
        assert_eq!(lines, "error: 1 more was left out\nerror: 2 more were left out\n");
    }

    #[test]
    fn a_long_report_is_cut() {
        let mut line = String::new();
        put_escaped(&"x".repeat(5000), &mut line);
        assert_eq!(line.chars().count(), LONGEST + 1);
    }
}
