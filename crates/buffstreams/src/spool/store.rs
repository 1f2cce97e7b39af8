//! A spool's file: the only code that names the embedded store it stands on.
//!
//! One file in the spool's directory, locked by the process that has it open. Every change is one transaction that is on
//! disk when the call returns: a crash leaves the state before or after it, never one between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytes::Bytes;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageError,
    TableDefinition, WriteTransaction,
};

use crate::error::{Error, ErrorKind, Result};
use crate::proto::record::{Record, RefusedRecord, Unreadable};

const FILE: &str = "spool.redb";

/// Bytes of the file that are kept in memory; what waits to be sent is seldom far from what was just written.
const CACHE: usize = 16 * 1024 * 1024;

/// The format of what is stored. Another one is refused.
const FORMAT: u64 = 1;

/// What is known of the spool as a whole.
const STATE: TableDefinition<'_, &str, u64> = TableDefinition::new("state");
/// Messages by the number of a record's first.
const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
/// Numbers of messages in records whose fate is known, while others of their record wait.
const GONE: TableDefinition<'_, u64, ()> = TableDefinition::new("gone");
/// Messages that the receiver refused.
const FAILED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("failed");

/// What a spool remembers of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) stream: u128,
    /// How often it was opened to be sent from.
    pub(super) starts: u64,
    /// The number of the next message, and the lowest whose fate is not known.
    pub(super) end: u64,
    pub(super) done: u64,
}

/// One transaction.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// A record to add, with the number of its first message.
    pub(super) add: Option<(u64, Bytes)>,
    /// Records to remove, by their first numbers.
    pub(super) remove: Vec<u64>,
    /// Messages that the receiver refused, to be gone from their records.
    pub(super) refused: Vec<(u64, RefusedRecord)>,
    /// Failed messages that nobody wants any more.
    pub(super) forget: Vec<u64>,
}

impl Change {
    pub(super) fn is_empty(&self) -> bool {
        let Change { add, remove, refused, forget } = self;
        add.is_none() && remove.is_empty() && refused.is_empty() && forget.is_empty()
    }
}

#[derive(Debug)]
pub(super) struct Store {
    database: Database,
}

impl Store {
    pub(super) fn is_in(directory: &Path) -> bool {
        directory.join(FILE).is_file()
    }

    /// Opens the store in a directory, which is made if it is not there.
    pub(super) fn open(directory: &Path) -> Result<Store> {
        let named = |text: String| Error::new(ErrorKind::Spool, format!("the spool {}: {text}", directory.display()));
        std::fs::create_dir_all(directory).map_err(|error| named(format!("cannot be made: {error}")).because(error))?;
        let path = directory.join(FILE);
        let open = || Builder::new().set_cache_size(CACHE).create(&path);
        // A damaged file must not take the process with it.
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(database)) => {
                sync(directory).map_err(|error| named(format!("cannot be made to last: {error}")).because(error))?;
                Ok(Store { database })
            }
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => {
                Err(named("is in use; one process at a time can have it".into()))
            }
            Ok(Err(error)) => Err(named(format!("cannot be opened: {error}")).because(error)),
            Err(_) => Err(named(format!("cannot be opened: {FILE} is damaged"))),
        }
    }

    /// What is known of the spool; makes it if nothing is.
    pub(super) fn state(&self) -> Result<State> {
        self.write(|transaction| {
            let mut state = transaction.open_table(STATE)?;
            transaction.open_table(RECORDS)?;
            transaction.open_table(GONE)?;
            transaction.open_table(FAILED)?;
            let mut entry = |name: &str, otherwise: u64| -> std::result::Result<u64, redb::Error> {
                if let Some(known) = state.get(name)? {
                    return Ok(known.value());
                }
                state.insert(name, otherwise)?;
                Ok(otherwise)
            };
            let format = entry("format", FORMAT)?;
            if format != FORMAT {
                return Err(redb::Error::Corrupted(format!("it has format {format}, and this library knows {FORMAT}")));
            }
            let (high, low) = (entry("stream high", fastrand::u64(..))?, entry("stream low", fastrand::u64(..))?);
            Ok(State {
                stream: u128::from(high) << 64 | u128::from(low),
                starts: entry("starts", 0)?,
                end: entry("end", 1)?,
                done: entry("done", 1)?,
            })
        })
    }

    /// Makes one change, and notes how far it has come with that.
    pub(super) fn commit(&self, change: &Change, state: State) -> Result<()> {
        self.write(|transaction| {
            let mut records = transaction.open_table(RECORDS)?;
            let mut gone = transaction.open_table(GONE)?;
            let mut failed = transaction.open_table(FAILED)?;
            if let Some((first, record)) = &change.add {
                records.insert(first, record.as_ref())?;
            }
            for first in &change.remove {
                records.remove(first)?;
            }
            for (number, refused) in &change.refused {
                failed.insert(number, refused.write(*number).as_slice())?;
                gone.insert(number, ())?;
            }
            for number in &change.forget {
                failed.remove(number)?;
            }
            // What is before the first unknown fate is gone without being named.
            gone.retain_in(..state.done, |_, ()| false)?;
            let mut table = transaction.open_table(STATE)?;
            table.insert("starts", state.starts)?;
            table.insert("end", state.end)?;
            table.insert("done", state.done)?;
            Ok(())
        })
    }

    /// Calls `each` with every record, or with why it cannot be read.
    pub(super) fn records(&self, mut each: impl FnMut(u64, Result<Record, String>)) -> Result<()> {
        self.read(|transaction| {
            for entry in transaction.open_table(RECORDS)?.iter()? {
                let (first, record) = entry?;
                let read = Record::read(first.value(), Bytes::copy_from_slice(record.value()));
                each(first.value(), read.map_err(|unreadable| unreadable.to_string()));
            }
            Ok(())
        })
    }

    /// The record with this first number.
    pub(super) fn record(&self, first: u64) -> Result<Record> {
        self.read(|transaction| {
            let table = transaction.open_table(RECORDS)?;
            let record = table.get(first)?.ok_or_else(|| corrupted(first, "it is not there any more"))?;
            Record::read(first, Bytes::copy_from_slice(record.value()))
                .map_err(|unreadable| corrupted(first, unreadable))
        })
    }

    pub(super) fn gone(&self) -> Result<Vec<u64>> {
        self.read(|transaction| transaction.open_table(GONE)?.iter()?.map(|entry| Ok(entry?.0.value())).collect())
    }

    /// How many failed messages there are, and about how many bytes they take.
    pub(super) fn failed_size(&self) -> Result<(u64, u64)> {
        self.read(|transaction| {
            let table = transaction.open_table(FAILED)?;
            Ok((table.len()?, table.stats()?.stored_bytes()))
        })
    }

    /// The first failed message whose number is at least this.
    pub(super) fn failed_from(&self, number: u64) -> Result<Option<(u64, Result<RefusedRecord, Unreadable>)>> {
        self.read(|transaction| {
            let table = transaction.open_table(FAILED)?;
            let Some(entry) = table.range(number..)?.next() else { return Ok(None) };
            let (number, bytes) = entry?;
            let number = number.value();
            Ok(Some((number, RefusedRecord::read(number, Bytes::copy_from_slice(bytes.value())))))
        })
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T> {
        guarded(|| {
            let mut transaction = self.database.begin_write()?;
            // Without this, the whole file is repaired after a crash, and given up for one damaged bit in it.
            transaction.set_quick_repair(true);
            let made = change(&transaction)?;
            transaction.commit()?;
            Ok(made)
        })
    }

    fn read<T>(&self, look: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T> {
        guarded(|| look(&self.database.begin_read()?))
    }
}

/// Makes the names of a new file and a new directory as lasting as what is in them.
#[cfg(unix)]
fn sync(directory: &Path) -> std::io::Result<()> {
    std::fs::File::open(directory)?.sync_all()?;
    match directory.canonicalize()?.parent() {
        Some(parent) => std::fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// There, directories cannot be opened, and need not.
#[cfg(not(unix))]
fn sync(_: &Path) -> std::io::Result<()> {
    Ok(())
}

/// An error of the store is one of the spool, and so is a panic over a damaged file.
fn guarded<T>(work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) => Err(Error::new(ErrorKind::Spool, format!("the spool: {error}")).because(error)),
        Err(_) => Err(Error::new(ErrorKind::Spool, format!("the spool: {FILE} is damaged"))),
    }
}

fn corrupted(first: u64, why: impl std::fmt::Display) -> redb::Error {
    StorageError::Corrupted(format!("the record that begins with message {first}: {why}")).into()
}
