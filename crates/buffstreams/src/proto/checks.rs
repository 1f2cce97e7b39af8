//! What must hold for any bytes that a stranger sends, one function for each parser.
//!
//! The fuzz targets in `fuzz/` call them with whatever they invent; `cargo test` with the corpora in `tests/corpus`. They
//! panic where something does not hold. Nothing else calls them, and they call nothing but the parsers.

use super::framing::{Framing, Prefix};
use super::inbox::{Delivered, Flow, Found, Inbox, Room};
use super::session::wire::{self, Control, Preface, VERSION};

use bytes::BufMut;

/// Maxima on both sides of every change of width that matters.
const MAXIMA: [usize; 6] = [1, 255, 4096, 65_535, 65_536, 1 << 30];

fn framings() -> impl Iterator<Item = Framing> {
    let pairs = Prefix::ALL.into_iter().flat_map(|prefix| MAXIMA.into_iter().map(move |max| (prefix, max)));
    pairs.filter_map(|(prefix, max)| Framing::with_max(prefix, max).ok())
}

/// A prefix has one meaning, however much of what follows is known, and one form.
pub(crate) fn prefix(bytes: &[u8]) {
    for framing in framings() {
        let whole = framing.header(bytes);
        for length in 0..bytes.len().min(16) {
            match framing.header(&bytes[..length]) {
                Ok(None) => {}
                decided => {
                    assert_eq!(decided.is_err(), whole.is_err(), "more bytes change the meaning of {bytes:02x?}")
                }
            }
        }
        match whole {
            Ok(Some(header)) => {
                let mut again = Vec::new();
                framing.put_prefix(header.message, &mut again);
                assert_eq!(again, bytes[..header.prefix], "two forms of one length in {framing:?}");
            }
            Ok(None) => assert!(bytes.len() < 10, "a prefix of more than ten bytes in {framing:?}"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// The same bytes give the same frames, and end in the same way, however they are split. The first two bytes choose what
/// is spoken and how it is split.
pub(crate) fn inbox(bytes: &[u8]) {
    let [choice, split, rest @ ..] = bytes else { return };
    let plain: Vec<_> = framings().collect();
    let (framing, in_session) = match usize::from(*choice) {
        choice if choice < 200 => (plain[choice % plain.len()], false),
        choice => (Framing::for_session(MAXIMA[choice % MAXIMA.len()]).expect("sessions can have any"), true),
    };
    let whole = frames(framing, in_session, rest, usize::MAX);
    let parts = frames(framing, in_session, rest, usize::from(*split).max(1));
    assert_eq!(whole, parts, "a split changes what is found");
}

/// What is found, and how it ends.
fn frames(framing: Framing, in_session: bool, mut bytes: &[u8], step: usize) -> (Vec<(bool, Vec<u8>)>, Option<String>) {
    let mut inbox = Inbox::new(framing);
    if in_session {
        inbox.enter_session(framing, 0);
    }
    let mut scratch = vec![0xaa; 64 * 1024];
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let read = match inbox.room(&mut scratch) {
            Room::Scratch(room) => {
                let read = step.min(room.len()).min(bytes.len());
                room[..read].copy_from_slice(&bytes[..read]);
                read
            }
            Room::Own(mut room) => {
                let read = step.min(room.chunk_mut().len()).min(bytes.len());
                room.put_slice(&bytes[..read]);
                read
            }
        };
        bytes = &bytes[read..];
        let delivered = if in_session {
            inbox.deliver_in_session(&mut scratch, read, usize::MAX, |frame| {
                found.push(match frame {
                    Found::Message(message) => (false, message.to_vec()),
                    Found::Control(control) => (true, control.to_vec()),
                });
                Flow::Continue
            })
        } else {
            inbox.deliver(&mut scratch, read, usize::MAX, |message| {
                found.push((false, message.to_vec()));
                Flow::Continue
            })
        };
        match delivered {
            Ok(delivered) => assert_eq!(delivered, Delivered::All),
            Err(error) => return (found, Some(error.to_string())),
        }
    }
    (found, inbox.end().err().map(|error| error.to_string()))
}

/// A connection is known for what it is at the first byte that tells, and stays that.
pub(crate) fn preface(bytes: &[u8]) {
    let mut known = Preface::Incomplete;
    for length in 0..=bytes.len() {
        let now = Preface::of(&bytes[..length]);
        assert!(known == Preface::Incomplete || now == known, "it was {known:?}, and is {now:?}");
        known = now;
    }
    assert!(known != Preface::Incomplete || bytes.len() < wire::PREFACE);
    if let Preface::Session { version: VERSION } = known {
        let mut again = Vec::new();
        Preface::put(&mut again);
        assert!(bytes.starts_with(&again));
        for framing in framings().filter(wire::takes_sessions) {
            assert!(framing.header(bytes).is_err(), "it is a frame in {framing:?}");
        }
    }
}

/// A control frame has one form, and whatever is not one is an error that can be told.
pub(crate) fn control(bytes: &[u8]) {
    match Control::decode(bytes) {
        Ok(Control::Ignorable(kind)) => assert_eq!(bytes.first(), Some(&kind)),
        Ok(Control::Hello(hello)) if hello.versions.1 > VERSION => {}
        Ok(control) => {
            let framing = wire::handshake_framing();
            let mut again = Vec::new();
            control.put(&framing, &mut again);
            assert_eq!(&again[framing.prefix_width(0)..], bytes, "two forms of {control:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Both directions of a connection are read along in the same way, however they are split, and no more is kept than may
/// be. The first three bytes choose what is spoken, how it is split, and how much may be kept; then each piece says whose it
/// is and how long.
#[cfg(feature = "dissect")]
pub(crate) fn dissect(bytes: &[u8]) {
    let [choice, split, longest, rest @ ..] = bytes else { return };
    let plain: Vec<_> = framings().collect();
    let framing = plain[usize::from(*choice) % plain.len()];
    let longest = usize::from(*longest) * 8;
    let whole = dissected(framing, longest, rest, usize::MAX);
    let parts = dissected(framing, longest, rest, usize::from(*split).max(1));
    assert_eq!(whole, parts, "a split changes what is found");
}

/// What is found in each piece, and how it ends.
#[cfg(feature = "dissect")]
fn dissected(framing: Framing, longest: usize, mut rest: &[u8], step: usize) -> Vec<String> {
    use super::dissect::{Direction, Dissected, Dissector};
    let mut dissector = Dissector::new(framing, longest);
    let mut lines = Vec::new();
    while let [head, behind @ ..] = rest {
        let direction = if head & 0x80 == 0 { Direction::There } else { Direction::Back };
        let (piece, behind) = behind.split_at(usize::from(head & 0x7f).min(behind.len()));
        rest = behind;
        for part in piece.chunks(step) {
            let fed = dissector.feed(direction, part, |found| {
                if let Dissected::Message { bytes, .. } = found {
                    assert!(bytes.len() <= longest, "more was kept than may be");
                }
                lines.push(match found {
                    Dissected::Control(frame) => format!("{direction:?} {frame}"),
                    found => format!("{direction:?} {found:?}"),
                });
            });
            lines.extend(fed.err().map(|error| format!("{direction:?} {error}")));
            assert!(dissector.held() <= 2 * (longest.max(1024) + 10), "{} bytes are kept", dissector.held());
        }
    }
    for direction in [Direction::There, Direction::Back] {
        lines.extend(dissector.end(direction).err().map(|error| format!("{direction:?} {error}")));
    }
    lines
}

/// What a spool reads is what it would have written: whatever passes the checksum has one form, and every message that it
/// counts is there. The first byte chooses whether the checksum is put right first.
#[cfg(feature = "spool")]
pub(crate) fn record(bytes: &[u8]) {
    use super::record::{Record, RecordWriter, RefusedRecord, SpoolState, sign};
    let [choice, number, stored @ ..] = bytes else { return };
    // Also numbers at whose end there is no next one.
    let number = if *number < 250 { u64::from(*number) } else { u64::MAX - u64::from(*number - 250) };
    let mut stored = stored.to_vec();
    if choice % 2 == 1 {
        sign(number, &mut stored);
    }
    match Record::read(number, stored.clone().into()) {
        Ok(record) => {
            let (end, mut writer) = (record.end(), RecordWriter::default());
            let mut next = number;
            for (number, message) in record {
                assert_eq!(number, next);
                writer.push(&message);
                next += 1;
            }
            assert!(next == end && next > number, "a message that is counted is not there");
            assert_eq!(writer.finish(number), stored, "two forms of one record");
        }
        Err(unreadable) => assert!(!unreadable.to_string().is_empty()),
    }
    match RefusedRecord::read(number, stored.clone().into()) {
        Ok(refused) => assert_eq!(refused.write(number), stored, "two forms of one refused message"),
        Err(unreadable) => assert!(!unreadable.to_string().is_empty()),
    }
    match SpoolState::read(&stored) {
        Ok(state) => assert_eq!(state.write(), stored, "two forms of one state"),
        Err(unreadable) => assert!(!unreadable.to_string().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn everything_in_the_corpora_passes() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
        for (name, check) in [
            ("prefix", super::prefix as fn(&[u8])),
            ("inbox", super::inbox),
            ("preface", super::preface),
            ("control", super::control),
            #[cfg(feature = "dissect")]
            ("dissect", super::dissect),
            #[cfg(feature = "spool")]
            ("record", super::record),
        ] {
            let files = fs::read_dir(corpora.join(name)).expect("there is a corpus for each parser");
            let mut count = 0;
            for file in files {
                check(&fs::read(file.expect("a corpus can be read").path()).expect("a corpus can be read"));
                count += 1;
            }
            assert!(count >= 8, "{count} files are in the corpus of {name}");
        }
    }
}
