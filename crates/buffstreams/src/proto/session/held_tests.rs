//! What is held comes back, whatever is taken, put back or removed meanwhile; and how much it takes.

use std::collections::VecDeque;

use fastrand::Rng;

use super::*;

fn framing() -> Framing {
    Framing::for_session(20_000).unwrap()
}

#[test]
fn what_is_held_comes_back_in_order_whatever_is_put_back_or_removed_meanwhile() {
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let (mut held, mut model) = (Held::new(framing(), usize::MAX), VecDeque::new());
        let mut next = 1;
        for _ in 0..300 {
            match rng.u8(..10) {
                0..6 => {
                    next += if rng.u8(..5) == 0 { rng.u64(1..4) } else { 0 };
                    let length = *rng.choice(&[0, 1, 30, 700, 9_000]).unwrap();
                    let message = vec![next as u8; length];
                    held.push(next, &message).unwrap();
                    model.push_back((next, message));
                    next += 1;
                }
                6..8 => {
                    let taken = held.take();
                    assert_eq!(taken.as_ref().map(|(number, message)| (*number, &message[..])), first_of(&model));
                    model.pop_front();
                    if let Some((number, message)) = taken.filter(|_| rng.bool()) {
                        held.put_back(number, &message);
                        model.push_front((number, message.to_vec()));
                    }
                }
                _ => {
                    let number = rng.u64(..next + 1);
                    held.remove(number);
                    model.retain(|(kept, _)| *kept != number);
                }
            }
            let frames = model.iter().map(|(_, message)| message.len() + framing().prefix_width(message.len()));
            assert_eq!((held.bytes(), held.messages()), (frames.sum(), model.len() as u64), "seed {seed}");
            assert_eq!(held.first(), model.front().map(|(number, _)| *number));
            assert!(held.memory() >= held.bytes());
        }
        while let Some((number, message)) = held.take() {
            assert_eq!(model.pop_front(), Some((number, message.to_vec())));
        }
        assert!(model.is_empty() && held.is_empty() && held.memory() == 0 && held.blocks.is_empty());
    }
}

fn first_of(model: &VecDeque<(u64, Vec<u8>)>) -> Option<(u64, &[u8])> {
    model.front().map(|(number, message)| (*number, &message[..]))
}

/// Bytes of all blocks, whether in use or not.
fn room(held: &Held) -> usize {
    held.blocks.values().map(|block| block.frames.capacity()).sum()
}

#[test]
fn messages_of_any_size_take_no_more_room_than_their_frames() {
    for length in [0, 1, 100, 1_100, 2_100, 5_000] {
        let mut held = Held::new(framing(), usize::MAX);
        let (count, frame) = (1_000_000 / (length + 10), framing().prefix_width(length) + length);
        for number in 1..=count as u64 {
            held.push(number, &vec![1; length]).unwrap();
        }
        let frames = count * frame;
        assert_eq!((held.bytes(), held.memory()), (frames, frames));
        assert!(room(&held) <= frames + BLOCK, "{} bytes for {frames}, each {frame}", room(&held));
        assert!(held.blocks.len() <= 2 * frames / BLOCK + 1);
    }
}

#[test]
fn gaps_are_accounted_for() {
    let mut held = Held::new(framing(), usize::MAX);
    for number in 1..=1_000 {
        held.push(2 * number, b"").unwrap();
    }
    assert_eq!(held.memory(), held.bytes() + 999 * GAP);
    assert!(room(&held) + 64 * held.blocks.len() <= held.memory());
}

#[test]
fn nothing_is_held_beyond_the_window() {
    let mut held = Held::new(framing(), 2 * framing().prefix_width(0) + 1);
    held.push(1, b"").unwrap();
    held.push(2, b"1").unwrap();
    let (window, held_bytes) = (held.bytes(), held.bytes() + framing().prefix_width(0));
    assert_eq!(held.push(3, b""), Err(SessionError::WindowExceeded { held: held_bytes, window }));
    assert_eq!((held.bytes(), held.messages()), (window, 2));
    held.take();
    held.push(3, b"").unwrap();
}

#[test]
fn a_message_that_was_taken_keeps_no_more_alive_than_its_block() {
    let mut held = Held::new(framing(), usize::MAX);
    for number in 1..=1_000 {
        held.push(number, &[0; 100]).unwrap();
    }
    held.take();
    assert!(held.front.len() < BLOCK);
}
