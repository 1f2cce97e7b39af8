//! A spool's file: the only code that names the embedded store it stands on.
//!
//! One file in the spool's directory, locked by the process that has it open. Every change is one transaction that is on
//! disk when the call returns: a crash leaves the state before or after it, never one between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition, WriteTransaction,
};

use crate::error::{Error, ErrorKind, Result};
use crate::proto::record::{Record, RefusedRecord, SpoolState, Unreadable};

const FILE: &str = "spool.redb";

/// Bytes of the file that are kept in memory; what waits to be sent is seldom far from what was just written.
const CACHE: usize = 16 * 1024 * 1024;

/// What is known of the spool as a whole.
const STATE: TableDefinition<'_, (), &[u8]> = TableDefinition::new("state");
/// Messages by the number of a record's first.
const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
/// Numbers of messages in records whose fate is known, while others of their record wait.
const GONE: TableDefinition<'_, u64, ()> = TableDefinition::new("gone");
/// Messages that the receiver refused.
const FAILED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("failed");

/// One transaction.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// A record to add, with the number of its first message.
    pub(super) add: Option<(u64, Bytes)>,
    /// Records to remove, by their first numbers.
    pub(super) remove: Vec<u64>,
    /// Messages that the receiver refused, in the form in which they are kept, to be gone from their records.
    pub(super) refused: Vec<(u64, Vec<u8>)>,
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
    /// There until it is dropped.
    database: Option<Database>,
    directory: PathBuf,
}

impl Store {
    pub(super) fn is_in(directory: &Path) -> bool {
        directory.join(FILE).is_file()
    }

    /// Opens the store in a directory, which is made if it is not there.
    pub(super) fn open(directory: &Path) -> Result<Store> {
        let failed = |what: &str, error: std::io::Error| about(directory, format!("{what}: {error}")).because(error);
        std::fs::create_dir_all(directory).map_err(|error| failed("cannot be made", error))?;
        let path = directory.join(FILE);
        let store = Store::opened(directory, || Builder::new().set_cache_size(CACHE).create(&path))?;
        sync(directory).map_err(|error| failed("cannot be made to last", error))?;
        Ok(store)
    }

    fn opened(directory: &Path, open: impl FnOnce() -> Result<Database, DatabaseError>) -> Result<Store> {
        // A damaged file must not take the process with it.
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(database)) => Ok(Store { database: Some(database), directory: directory.to_owned() }),
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => {
                Err(about(directory, "is in use; one process at a time can have it"))
            }
            Ok(Err(error)) => Err(about(directory, format!("cannot be opened: {error}")).because(error)),
            Err(_) => Err(about(directory, format!("cannot be opened: {FILE} is damaged"))),
        }
    }

    /// What is known of the spool; makes it if nothing is.
    pub(super) fn state(&self) -> Result<SpoolState> {
        self.write(|transaction| {
            transaction.open_table(RECORDS)?;
            transaction.open_table(GONE)?;
            transaction.open_table(FAILED)?;
            let mut table = transaction.open_table(STATE)?;
            if let Some(known) = table.get(())? {
                let read = SpoolState::read(known.value());
                return read.map_err(|unreadable| corrupted("what it knows of itself", unreadable));
            }
            let stream = u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..));
            let state = SpoolState { stream, starts: 0, end: 1, done: 1, unsent: 0 };
            table.insert((), state.write().as_slice())?;
            Ok(state)
        })
    }

    /// Makes one change, and notes how far it has come with that.
    pub(super) fn commit(&self, change: &Change, state: SpoolState) -> Result<()> {
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
                failed.insert(number, refused.as_slice())?;
                gone.insert(number, ())?;
            }
            for number in &change.forget {
                failed.remove(number)?;
            }
            // What is before the first unknown fate is gone without being named.
            gone.retain_in(..state.done, |_, ()| false)?;
            transaction.open_table(STATE)?.insert((), state.write().as_slice())?;
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

    /// That each of these records is found by its number, and so whatever is added comes behind them.
    ///
    /// # Errors
    ///
    /// Damage between the records hides one that is still there.
    pub(super) fn find(&self, firsts: impl Iterator<Item = u64>) -> Result<()> {
        self.read(|transaction| {
            let table = transaction.open_table(RECORDS)?;
            for first in firsts {
                let hidden = || corrupted(record_of(first), "it is there, and is not found by its number");
                table.get(first)?.ok_or_else(hidden)?;
            }
            Ok(())
        })
    }

    /// The record with this first number.
    pub(super) fn record(&self, first: u64) -> Result<Record> {
        self.read(|transaction| {
            let table = transaction.open_table(RECORDS)?;
            let record = table.get(first)?.ok_or_else(|| corrupted(record_of(first), "it is not there any more"))?;
            Record::read(first, Bytes::copy_from_slice(record.value()))
                .map_err(|unreadable| corrupted(record_of(first), unreadable))
        })
    }

    pub(super) fn gone(&self) -> Result<Vec<u64>> {
        self.read(|transaction| transaction.open_table(GONE)?.iter()?.map(|entry| Ok(entry?.0.value())).collect())
    }

    /// How many failed messages there are, and how many bytes they take.
    pub(super) fn failed_size(&self) -> Result<(u64, u64)> {
        self.read(|transaction| {
            let (mut count, mut bytes) = (0, 0);
            for entry in transaction.open_table(FAILED)?.iter()? {
                count += 1;
                bytes += entry?.1.value().len() as u64;
            }
            Ok((count, bytes))
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

    fn database(&self) -> &Database {
        self.database.as_ref().expect("it is there until it is dropped")
    }

    /// An error of the store is one of the spool, and so is a panic over a damaged file.
    fn guarded<T>(&self, work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T> {
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(redb::Error::Io(error))) if is_full(&error) => {
                let advice = "what it took before is safe there, and is sent once there is room again";
                Err(about(&self.directory, format!("{error}; {advice}")).because(error))
            }
            Ok(Err(error)) => Err(about(&self.directory, &error).because(error)),
            Err(_) => Err(about(&self.directory, format!("{FILE} is damaged"))),
        }
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T> {
        self.guarded(|| {
            let mut transaction = self.database().begin_write()?;
            // Without this, the whole file is repaired after a crash, and given up for one damaged bit in it.
            transaction.set_quick_repair(true);
            let made = change(&transaction)?;
            transaction.commit()?;
            Ok(made)
        })
    }

    fn read<T>(&self, look: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T> {
        self.guarded(|| look(&self.database().begin_read()?))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let database = self.database.take();
        // What has panicked over a damaged file does so again when it is put away.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
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

/// Whether a file cannot grow any more.
fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn about(directory: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Spool, format!("the spool {}: {what}", directory.display()))
}

fn corrupted(what: impl std::fmt::Display, why: impl std::fmt::Display) -> redb::Error {
    StorageError::Corrupted(format!("{what}: {why}")).into()
}

fn record_of(first: u64) -> String {
    format!("the record that begins with message {first}")
}

#[cfg(test)]
impl Store {
    /// On a disk of a test's own.
    pub(super) fn on(disk: impl redb::StorageBackend) -> Result<Store> {
        let open = || Builder::new().set_cache_size(CACHE).create_with_backend(disk);
        Store::opened(Path::new("on a disk of its own"), open)
    }
}
