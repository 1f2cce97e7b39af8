//! What is said of damage: bits flipped anywhere in a spool's file, and its end cut off, closed or left by a process that was
//! killed; and what is made of a spool whose parts do not agree.

use std::collections::{BTreeSet, HashSet};
use std::fs;

use super::keeper_tests::Disk;
use super::*;
use crate::error::ErrorKind;

const RECORDS: u64 = 100;
const IN_RECORD: u64 = 100;

fn message(number: u64) -> Vec<u8> {
    // Nothing in it repeats, so that no two places of the file are alike.
    let mut random = fastrand::Rng::with_seed(number);
    (0..80).map(|_| random.u8(..)).collect()
}

/// Puts many records into a spool, some of which come and go.
fn fill(mut spool: Spool) -> Spool {
    for _ in 0..2 * RECORDS {
        let (first, mut writer) = (spool.state.end, RecordWriter::default());
        (first..first + IN_RECORD).for_each(|number| writer.push(&message(number)));
        spool.state.end += IN_RECORD;
        let mut change = Change { add: Some((first, writer.finish(first))), ..Change::default() };
        if first > RECORDS * IN_RECORD {
            change.remove.push(spool.state.done);
            spool.state.done += IN_RECORD;
        }
        spool.store.commit(&change, spool.state).unwrap();
    }
    spool
}

#[derive(Debug, Default)]
struct Outcomes {
    intact: u32,
    told: u32,
    refused: u32,
    silent: u32,
}

/// Flips one bit in each of many copies, or cuts the last bytes off, and opens them.
fn damage(image: &[u8], outcomes: &mut Outcomes, random: &mut fastrand::Rng, trials: usize) {
    let used: Vec<usize> =
        (0..image.len()).step_by(512).filter(|at| image[*at..*at + 512].iter().any(|byte| *byte != 0)).collect();
    for _ in 0..trials {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = image.to_vec();
        match random.u8(..10) {
            0 => bytes.truncate(random.usize(..bytes.len())),
            _ => bytes[used[random.usize(..used.len())] + random.usize(..512)] ^= 1 << random.u32(..8),
        }
        fs::write(folder.path().join("spool.redb"), bytes).unwrap();
        judge(Spool::open(folder.path()), outcomes);
    }
}

/// Counts what is said of damage in what was opened.
fn judge(opened: Result<Spool>, outcomes: &mut Outcomes) {
    let spool = match opened {
        Ok(spool) => spool,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Spool);
            outcomes.refused += 1;
            return;
        }
    };
    let mut missing: BTreeSet<u64> = (RECORDS * IN_RECORD + 1..=2 * RECORDS * IN_RECORD).collect();
    for extent in &spool.extents {
        for (number, bytes) in spool.store.record(extent.first).unwrap() {
            assert_eq!(bytes, message(number), "a message is delivered as it was, or not at all");
            missing.remove(&number);
        }
    }
    let told: BTreeSet<u64> = spool.damage.iter().flat_map(|damage| damage.from..=damage.to).collect();
    match (missing.is_empty(), told == missing) {
        (true, _) => outcomes.intact += 1,
        (false, true) => outcomes.told += 1,
        (false, false) => outcomes.silent += 1,
    }
}

/// How many copies, and the seed of all that is random. It is the same each time, unless more are asked for: over some damage the
/// store under the spool ends the process, about once in several thousand.
fn trials() -> (usize, u64) {
    let given = |name| std::env::var(name).ok().map(|value| value.parse().unwrap());
    let more = given("BUFFSTREAMS_FLIPS");
    let seed = given("BUFFSTREAMS_SEED").unwrap_or_else(|| if more.is_some() { fastrand::u64(..) } else { 1 });
    println!("BUFFSTREAMS_SEED={seed}");
    (more.map_or(60, |trials| trials as usize), seed)
}

#[test]
fn wherever_a_spool_is_damaged_what_is_lost_is_told() {
    let (trials, seed) = trials();
    // The spool's name is random, too.
    fastrand::seed(seed);
    let mut random = fastrand::Rng::with_seed(seed);
    for is_killed in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let spool = fill(Spool::open(folder.path()).unwrap());
        let path = folder.path().join("spool.redb");
        // A copy of the open file is what a killed process leaves.
        let killed = fs::read(&path).unwrap();
        drop(spool);
        let image = if is_killed { killed } else { fs::read(&path).unwrap() };
        let mut outcomes = Outcomes::default();
        damage(&image, &mut outcomes, &mut random, trials);
        println!("figures: killed: {is_killed}, {trials} times damaged, {} bytes: {outcomes:?}", image.len());
        assert!(outcomes.told > 0, "most of the file is messages");
        assert_eq!(outcomes.silent, 0);
    }
}

#[test]
fn damage_between_the_records_is_no_panic_and_hides_none_of_them_from_whoever_asks_for_it() {
    const PAGE: usize = 4096;
    let disk = Disk::default();
    let spool = fill(disk.open(u64::MAX).unwrap());
    let image = disk.bytes();
    let begin_messages: HashSet<_> = (1..spool.state.end).map(|number| message(number)[..8].to_vec()).collect();
    let names: HashSet<_> = (0..RECORDS)
        .map(|record| (RECORDS + record) * IN_RECORD + 1)
        .map(|first| first.to_le_bytes().to_vec())
        .collect();
    let finds = |page: &usize, wanted: &HashSet<Vec<u8>>| -> Vec<usize> {
        (*page..*page + PAGE - 7).filter(|at| wanted.contains(&image[*at..*at + 8])).collect()
    };
    let is_between = |page: &usize| {
        image[*page..*page + PAGE].iter().any(|byte| *byte != 0) && finds(page, &begin_messages).is_empty()
    };
    let between: Vec<_> = (0..image.len()).step_by(PAGE).filter(is_between).collect();
    let anywhere = between.iter().flat_map(|page| *page..*page + PAGE).step_by(997);
    // Where records are found by their names, those of most stand together, behind a head that says how many there are.
    let indexes = between.iter().map(|page| (*page, finds(page, &names))).filter(|(_, found)| found.len() > 50);
    let in_indexes = indexes.flat_map(|(page, found)| (page..page + 8).chain(found.into_iter().step_by(3)));
    for places in [anywhere.collect::<Vec<_>>(), in_indexes.collect()] {
        let mut outcomes = Outcomes::default();
        for (trial, at) in places.iter().enumerate() {
            let mut bytes = image.clone();
            bytes[*at] ^= 1 << (trial % 8);
            judge(Disk::with(bytes).open(u64::MAX), &mut outcomes);
        }
        println!("figures: {} times damaged between the records: {outcomes:?}", places.len());
        assert!(outcomes.refused > 0 && outcomes.silent == 0);
    }
}

/// The record of these messages.
fn record(first: u64, messages: &[&str]) -> Option<(u64, Bytes)> {
    let mut writer = RecordWriter::default();
    messages.iter().for_each(|message| writer.push(message.as_bytes()));
    Some((first, writer.finish(first)))
}

#[test]
fn what_is_found_on_disk_goes_before_what_is_noted_of_it() {
    let disk = Disk::default();
    let spool = disk.open(u64::MAX).unwrap();
    let (stream, noted) = (spool.stream_id(), SpoolState { end: 3, done: 3, ..spool.state });
    for (first, messages) in [(1, &["done"][..]), (2, &["done, too", "waits"])] {
        let add = record(first, messages);
        spool.store.commit(&Change { add, ..Change::default() }, noted).unwrap();
    }
    drop(spool);
    let spool = disk.open(u64::MAX).unwrap();
    assert_eq!((spool.recovered(), spool.next_number(), spool.stream_id()), (1, 4, stream));
    assert!(spool.store.record(1).is_err(), "what is done is removed");
}

#[test]
fn what_was_damaged_is_removed_with_whatever_was_known_of_it() {
    let disk = Disk::default();
    let mut spool = disk.open(u64::MAX).unwrap();
    assert_eq!(spool.append(["a message that is damaged", "one that was refused"]).unwrap(), 2);
    assert_eq!(spool.append(["a message behind them"]).unwrap(), 1);
    let refused = vec![(2, b"unreadable".to_vec())];
    spool.store.commit(&Change { refused, ..Change::default() }, spool.state).unwrap();
    drop(spool);
    let mut bytes = disk.bytes();
    let wanted = b"a message that is damaged";
    for at in 0..bytes.len() - wanted.len() {
        bytes[at] ^= u8::from(bytes[at..].starts_with(wanted));
    }
    let disk = Disk::with(bytes);
    for why in ["checksum", "nothing is left"] {
        let mut spool = disk.open(700).unwrap();
        let damage = spool.damage();
        assert_eq!((damage.len(), damage[0].from, damage[0].to), (1, 1, 2));
        assert!(damage[0].why.contains(why), "{}", damage[0].why);
        assert_eq!((spool.recovered(), spool.failed_count(), spool.largest), (1, 1, 21));
        assert!(spool.failed().next().unwrap().is_err(), "it is told that it cannot be read");
        // 256 and 22 bytes wait, 10 were refused, and another record costs 256 again.
        assert_eq!(spool.append([[0; 156]]).unwrap(), 0);
    }
    assert_eq!(disk.open(701).unwrap().append([[0; 154]]).unwrap(), 1);
}
