//! Messages to standard output or into a recording: written in one of the formats, and flushed, batch by batch.
//!
//! Each connection gathers its batch in a buffer that it borrows while the batch lasts, so batches of different
//! connections never mix inside a message and an idle connection holds nothing. `--count` is kept here: a message is
//! printed only if it has taken one of the places that are left, and it is counted as received only once it is written.
//! Whether a batch is written is known when it ends, and not before. Bytes go out as they are, but to a terminal.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
#[cfg(unix)]
use std::os::fd::AsFd;
#[cfg(windows)]
use std::os::windows::io::AsHandle;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use buffstreams::{Framing, Prefix};
use tokio::sync::Notify;

use crate::report::{Report, bytes};
use crate::shown::shown;
use crate::{args, fields, recording};

/// A batch is written in parts of about this size, however long it is.
const PART: usize = 256 * 1024;

/// A buffer that grew beyond this is not kept for the next batch.
const KEEP: usize = 4 * PART;

/// What standard output is called where it fails.
const STDOUT: &str = "standard output";

/// Writes to standard output what is no message.
///
/// # Errors
///
/// As the operating system says, with the name.
pub(crate) fn put(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(stdout_failed)
}

/// The same error with the name of standard output.
pub(crate) fn stdout_failed(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{STDOUT}: {error}"))
}

/// Where all connections' messages go.
#[derive(Debug)]
pub(crate) struct Output {
    format: args::Output,
    destination: Destination,
    buffers: Mutex<Vec<Vec<u8>>>,
    /// Places left; `None` without a `--count`.
    places: Option<AtomicU64>,
    received: AtomicU64,
    received_bytes: AtomicU64,
    undecodable: AtomicU64,
    /// Messages that must still be written until `--count` is reached.
    missing: Option<AtomicU64>,
    closing: AtomicBool,
    failure: OnceLock<io::Error>,
    over: Notify,
    report: Arc<Report>,
}

/// Why nothing more will be printed.
#[derive(Debug)]
pub(crate) enum Over<'a> {
    CountReached,
    Failed(&'a io::Error),
}

/// How much was received, and how much of it could not be printed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) undecodable: u64,
}

impl Output {
    /// # Errors
    ///
    /// Standard output cannot be used at all.
    pub(crate) fn new(format: args::Output, count: Option<u64>, report: Arc<Report>) -> io::Result<Arc<Output>> {
        Ok(Output::to(Destination::stdout()?, format, count, report))
    }

    /// Into this file, called `name`, as a recording that is still to [begin](Self::begin).
    pub(crate) fn recording(
        file: File,
        name: String,
        count: Option<u64>,
        report: Arc<Report>,
    ) -> io::Result<Arc<Output>> {
        Ok(Output::to(Destination::recording(file, name)?, args::Output::Recording, count, report))
    }

    /// Gives up what was in the file before, and writes the head of a recording.
    ///
    /// # Errors
    ///
    /// As the operating system says, with the name.
    pub(crate) fn begin(&self, head: &[u8]) -> io::Result<()> {
        let name = self.name();
        self.destination.begin(head).map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
    }

    fn to(destination: Destination, format: args::Output, count: Option<u64>, report: Arc<Report>) -> Arc<Output> {
        Arc::new(Output {
            format,
            destination,
            buffers: Mutex::default(),
            places: count.map(AtomicU64::new),
            received: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            undecodable: AtomicU64::new(0),
            missing: count.map(AtomicU64::new),
            closing: AtomicBool::new(false),
            failure: OnceLock::new(),
            over: Notify::new(),
            report,
        })
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        &self.destination.name
    }

    /// Waits until nothing more will be printed: `--count` messages are written, or standard output has failed.
    pub(crate) async fn over(&self) -> Over<'_> {
        loop {
            let notified = self.over.notified();
            if let Some(over) = self.is_over() {
                return over;
            }
            notified.await;
        }
    }

    /// Whether nothing more will be printed, and why.
    pub(crate) fn is_over(&self) -> Option<Over<'_>> {
        if let Some(error) = self.failure.get() {
            return Some(Over::Failed(error));
        }
        let is_reached = self.missing.as_ref().is_some_and(|missing| missing.load(Ordering::Acquire) == 0);
        is_reached.then_some(Over::CountReached)
    }

    /// Lets connections come to their end that wait because there is no place left.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Whether places are limited, so that there may be messages without one.
    pub(crate) fn has_count(&self) -> bool {
        self.places.is_some()
    }

    /// Whether no place is left, and none ever will be.
    pub(crate) fn is_full(&self) -> bool {
        self.places.as_ref().is_some_and(|places| places.load(Ordering::Relaxed) == 0)
    }

    pub(crate) fn received(&self) -> Received {
        Received {
            messages: self.received.load(Ordering::Relaxed),
            bytes: self.received_bytes.load(Ordering::Relaxed),
            undecodable: self.undecodable.load(Ordering::Relaxed),
        }
    }

    fn take_place(&self) -> bool {
        let Some(places) = &self.places else { return true };
        places.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), OutputFailed> {
        if self.failure.get().is_some() {
            return Err(OutputFailed);
        }
        let written = match self.destination.is_terminal {
            true => self.report.above_bar(|| self.destination.write(shown(bytes).as_bytes())),
            false => self.destination.write(bytes),
        };
        written.map_err(|error| {
            // Of several batches that fail at once the first says why.
            drop(self.failure.set(error));
            self.over.notify_waiters();
            OutputFailed
        })
    }

    fn count(&self, batch: &Counted) {
        self.received.fetch_add(batch.printed + batch.undecodable, Ordering::Relaxed);
        self.received_bytes.fetch_add(batch.bytes, Ordering::Relaxed);
        self.undecodable.fetch_add(batch.undecodable, Ordering::Relaxed);
        if let Some(missing) = &self.missing
            && missing.fetch_sub(batch.printed, Ordering::AcqRel) == batch.printed
        {
            self.over.notify_waiters();
        }
    }
}

/// The output has failed; [`Output::over`] says how.
#[derive(Debug)]
pub(crate) struct OutputFailed;

impl fmt::Display for OutputFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the output takes no more")
    }
}

impl std::error::Error for OutputFailed {}

/// The messages of one connection between two writes.
#[derive(Debug)]
pub(crate) struct Batch {
    output: Arc<Output>,
    buffer: Vec<u8>,
    counted: Counted,
    /// A part of it could not be written.
    has_failed: bool,
    /// Whose messages these are, in a recording.
    source: recording::Source,
    /// When the first of them came, there.
    at: Option<SystemTime>,
}

/// What a batch adds to the totals once it is written.
#[derive(Debug, Default)]
struct Counted {
    printed: u64,
    undecodable: u64,
    bytes: u64,
}

impl Batch {
    pub(crate) fn new(output: Arc<Output>) -> Batch {
        Batch::of(recording::Source::default(), output)
    }

    /// For the messages of this connection.
    pub(crate) fn of(source: recording::Source, output: Arc<Output>) -> Batch {
        Batch { output, buffer: Vec::new(), counted: Counted::default(), has_failed: false, source, at: None }
    }

    pub(crate) fn output(&self) -> &Output {
        &self.output
    }

    /// Adds a message, and says whether there was a place for it. One that cannot be decoded needs none, and is done with.
    pub(crate) fn add(&mut self, message: &[u8], from: &dyn fmt::Display) -> bool {
        self.add_led("", message, from)
    }

    /// The same with `lead` before every line that it takes.
    pub(crate) fn add_led(&mut self, lead: &str, message: &[u8], from: &dyn fmt::Display) -> bool {
        if self.output.is_full() {
            return false;
        }
        let start = self.borrow_buffer();
        self.buffer.extend_from_slice(lead.as_bytes());
        let begin = self.buffer.len();
        if let args::Output::Json(schema) = &self.output.format
            && let Err(error) = schema.decode(message, &mut self.buffer)
        {
            self.buffer.truncate(start);
            self.counted.undecodable += 1;
            self.counted.bytes += message.len() as u64;
            let length = bytes(message.len());
            self.output
                .report
                .error(format_args!("a message of {length} from {from} is not a {}: {error}", schema.name()));
            return true;
        }
        // Only what can be printed takes a place: the count is of messages printed.
        if !self.output.take_place() {
            self.buffer.truncate(start);
            return false;
        }
        match &self.output.format {
            args::Output::Lines => {
                put_led(lead, message, &mut self.buffer);
                self.buffer.push(b'\n');
            }
            args::Output::Hex => {
                self.buffer.resize(begin + 2 * message.len(), 0);
                const_hex::encode_to_slice(message, &mut self.buffer[begin..]).expect("two digits a byte");
                self.buffer.push(b'\n');
            }
            args::Output::Json(_) => self.buffer.push(b'\n'),
            args::Output::Fields => {
                fields::put(message, &mut self.buffer);
                self.buffer.push(b'\n');
            }
            args::Output::Delimited => put_delimited(message, &mut self.buffer),
            args::Output::Recording => {
                let at = *self.at.get_or_insert_with(SystemTime::now);
                self.source.put_message(at, message, &mut self.buffer);
            }
            args::Output::None => self.buffer.truncate(start),
        }
        self.counted.printed += 1;
        self.counted.bytes += message.len() as u64;
        if self.buffer.len() >= PART {
            self.write();
        }
        true
    }

    /// Adds a line that is no message.
    pub(crate) fn add_line(&mut self, line: impl fmt::Display) {
        self.borrow_buffer();
        writeln!(self.buffer, "{line}").expect("a Vec grows");
    }

    /// Adds, in a recording, that no more messages will come.
    pub(crate) fn add_end(&mut self) {
        if matches!(self.output.format, args::Output::Recording) && self.source.has_messages() {
            self.borrow_buffer();
            self.source.put_end(SystemTime::now(), &mut self.buffer);
        }
    }

    /// Where the next thing that is added begins.
    fn borrow_buffer(&mut self) -> usize {
        if self.buffer.capacity() == 0 && !matches!(self.output.format, args::Output::None) {
            self.buffer = self.output.buffers().pop().unwrap_or_default();
        }
        self.buffer.len()
    }

    /// Writes what was added, counts it, and gives the buffer back.
    ///
    /// # Errors
    ///
    /// If any part of the batch could not be written.
    pub(crate) fn end(&mut self) -> Result<(), OutputFailed> {
        self.write();
        self.at = None;
        let buffer = std::mem::take(&mut self.buffer);
        if (1..=KEEP).contains(&buffer.capacity()) {
            self.output.buffers().push(buffer);
        }
        if std::mem::take(&mut self.has_failed) { Err(OutputFailed) } else { Ok(()) }
    }

    fn write(&mut self) {
        let counted = std::mem::take(&mut self.counted);
        let written = if self.buffer.is_empty() { Ok(()) } else { self.output.write(&self.buffer) };
        self.buffer.clear();
        match written {
            Ok(()) => self.output.count(&counted),
            // The message that the write broke in is lost to the reader too; none of these count as received.
            Err(OutputFailed) => self.has_failed = true,
        }
    }
}

fn put_delimited(message: &[u8], out: &mut Vec<u8>) {
    let framing = Framing::with_max(Prefix::Varint, Prefix::Varint.largest_max()).expect("its own largest maximum");
    framing.encode(message, out).expect("no message in memory is longer than that");
}

/// The message with `lead` behind every newline in it.
fn put_led(lead: &str, message: &[u8], out: &mut Vec<u8>) {
    if lead.is_empty() {
        return out.extend_from_slice(message);
    }
    for (index, line) in message.split(|byte| *byte == b'\n').enumerate() {
        if index > 0 {
            out.push(b'\n');
            out.extend_from_slice(lead.as_bytes());
        }
        out.extend_from_slice(line);
    }
}

/// A file without any buffering: what is written is with the kernel when the call returns.
#[derive(Debug)]
struct Destination {
    name: String,
    written: Mutex<Written>,
    /// Whether a write may wait for a reader, who may take his time.
    may_block: bool,
    /// Whether it shares the screen with standard error.
    is_terminal: bool,
    /// Whether what was written in part is taken back.
    is_recording: bool,
}

/// A file, and how much was wholly written into it from here.
#[derive(Debug)]
struct Written {
    file: File,
    /// In bytes; all of a recording.
    whole: u64,
    has_failed: bool,
}

impl Destination {
    fn stdout() -> io::Result<Destination> {
        #[cfg(unix)]
        let handle = io::stdout().as_fd().try_clone_to_owned()?;
        #[cfg(windows)]
        let handle = io::stdout().as_handle().try_clone_to_owned()?;
        let file = File::from(handle);
        let may_block = file.metadata().map_or(true, |metadata| !metadata.is_file());
        let is_terminal = file.is_terminal();
        let name = STDOUT.to_owned();
        let written = Mutex::new(Written { file, whole: 0, has_failed: false });
        Ok(Destination { name, written, may_block, is_terminal, is_recording: false })
    }

    fn recording(file: File, name: String) -> io::Result<Destination> {
        let is_recording = file.metadata()?.is_file();
        let written = Mutex::new(Written { file, whole: 0, has_failed: false });
        Ok(Destination { name, written, may_block: !is_recording, is_terminal: false, is_recording })
    }

    fn begin(&self, head: &[u8]) -> io::Result<()> {
        if self.is_recording {
            self.written().file.set_len(0)?;
        }
        self.write(head)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let write = || {
            let Written { file, whole, has_failed } = &mut *self.written();
            if *has_failed {
                // Behind a part of something nothing would be found again.
                return Err(io::Error::other("an earlier write has failed"));
            }
            let result = file.write_all(bytes);
            match result {
                Ok(()) => *whole += bytes.len() as u64,
                Err(_) => {
                    *has_failed = true;
                    if self.is_recording {
                        let _ = file.set_len(*whole);
                    }
                }
            }
            result
        };
        if self.may_block {
            // Other connections, deadlines and signals go on while this one waits for the reader.
            tokio::task::block_in_place(write)
        } else {
            write()
        }
    }
}
