//! What is said of damage: bits flipped anywhere in a spool's file, and its end cut off, closed or left by a process that was killed.

use std::collections::BTreeSet;
use std::fs;

use super::*;
use crate::error::ErrorKind;

const RECORDS: u64 = 100;
const IN_RECORD: u64 = 100;

fn message(number: u64) -> Vec<u8> {
    // Nothing in it repeats, so that no two places of the file are alike.
    let mut random = fastrand::Rng::with_seed(number);
    (0..80).map(|_| random.u8(..)).collect()
}

/// A spool with many records, some of which came and went before.
fn filled(directory: &Path) -> Spool {
    let mut spool = Spool::open(directory).unwrap();
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
        let spool = match Spool::open(folder.path()) {
            Ok(spool) => spool,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Spool);
                outcomes.refused += 1;
                continue;
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
}

#[test]
fn wherever_a_spool_is_damaged_what_is_lost_is_told() {
    let seed = std::env::var("BUFFSTREAMS_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("BUFFSTREAMS_SEED={seed}");
    let trials = std::env::var("BUFFSTREAMS_FLIPS").map_or(60, |trials| trials.parse().unwrap());
    let mut random = fastrand::Rng::with_seed(seed);
    for is_killed in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let spool = filled(folder.path());
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
