//! The file of failed messages: each in delimited form, so that `send --input delimited` can take them up again.
//!
//! Messages come from the connection's task and from the input at the same time; each is written whole, and is with the
//! operating system when the call returns, so nothing is lost if the program is then ended at once.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use prost::encoding::encode_varint;

use crate::input::Content;
use crate::report::Report;

/// Bytes of the longest varint.
const LONGEST_LENGTH: usize = 10;

/// Where failed messages go.
#[derive(Debug)]
pub(crate) struct FailedFile {
    path: PathBuf,
    file: Mutex<File>,
    report: Arc<Report>,
}

impl FailedFile {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    ///
    /// As [`File::create`].
    pub(crate) fn create(path: &Path, report: &Arc<Report>) -> io::Result<FailedFile> {
        let file =
            File::create(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(FailedFile { path: path.to_owned(), file: Mutex::new(file), report: Arc::clone(report) })
    }

    /// Adds a message. What goes wrong is reported, and the message is lost: there is no third place for it.
    pub(crate) fn add(&self, message: &[u8]) {
        let mut frame = Vec::with_capacity(LONGEST_LENGTH + message.len());
        encode_varint(message.len() as u64, &mut frame);
        frame.extend_from_slice(message);
        self.write(|file| file.write_all(&frame));
    }

    /// Adds what the input could not send, if it has bytes.
    pub(crate) fn add_content(&self, content: Content) {
        match content {
            Content::None => {}
            Content::Held(message) => self.add(&message),
            Content::Spilled(mut spilled, length) => self.write(|file| {
                // Longer than any message may be, but a varint has no limit that matters.
                let mut prefix = Vec::with_capacity(LONGEST_LENGTH);
                encode_varint(length, &mut prefix);
                file.write_all(&prefix)?;
                io::copy(&mut spilled, file).map(drop)
            }),
        }
    }

    fn write(&self, write: impl FnOnce(&mut File) -> io::Result<()>) {
        let result = write(&mut self.file.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = result {
            self.report.error(format_args!("cannot write to {}: {error}", self.path.display()));
        }
    }
}
