use std::collections::BTreeSet;
use std::time::Duration;

use crate::program::{Folder, Program, Signal, text};
use crate::reconnect::{Numbers, account, numbers};
use crate::wire::undelimited;

#[test]
fn when_the_first_listener_is_killed_the_second_prints_the_rest_and_the_account_adds_up() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (first, one) = Program::listen(&[]);
    let (second, two) = Program::listen(&[]);
    let mut sender = Program::start(["send", &format!("{one},{two}"), "--failed", &failed_file]);
    let writer = Numbers::start(sender.take_stdin());
    first.wait_lines(1000);
    first.signal(Signal::KILL);
    let first = first.end();
    second.wait_lines(1000);
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(sent.code(), Some(0), "{}", sent.stderr);
    assert_eq!(account(&sent), [written, written, 0]);
    assert!(undelimited(&std::fs::read(&failed_file).unwrap()).is_empty());
    second.signal(Signal::TERM);
    let second = second.end();
    let (before, after) = (numbers(&first.stdout), numbers(&second.stdout));
    assert!(before.iter().copied().eq(0..before.len() as u64), "from the beginning, in order");
    assert!(after.iter().copied().eq(after[0]..written), "and on to the end, nothing missing behind the break");
    assert!(after[0] >= before.len() as u64, "nothing twice");
}

#[test]
fn acknowledged_lines_are_all_printed_where_the_second_listener_takes_over_and_that_is_said() {
    let (first, one) = Program::listen(&[]);
    let (second, two) = Program::listen(&[]);
    let options = ["--delivery", "acked", "--patience", "200ms", "--window", "64KiB"];
    let mut sender = Program::start(["send", &format!("{one},{two}")].iter().copied().chain(options));
    let writer = Numbers::start(sender.take_stdin());
    first.wait_lines(1000);
    // Stopped, it takes lines and prints none, so some are in flight when it is killed.
    first.stop();
    std::thread::sleep(Duration::from_millis(50));
    first.signal(Signal::KILL);
    let first = first.end();
    second.wait_lines(1000);
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(sent.code(), Some(0), "{}", sent.stderr);
    assert_eq!(account(&sent), [written, written, 0]);
    let moved =
        format!("warning: the stream moved: both may handle what was in flight (from={one}, to={two}, in_flight=");
    assert!(sent.stderr.contains(&moved), "{}", sent.stderr);
    second.signal(Signal::TERM);
    let second = second.end();
    let (before, after) = (numbers(&first.stdout), numbers(&second.stdout));
    assert!(before.is_sorted_by(|one, next| one < next) && after.is_sorted_by(|one, next| one < next));
    let all: BTreeSet<u64> = before.into_iter().chain(after).collect();
    assert!(all.into_iter().eq(0..written), "none is missing");
}

#[test]
fn when_nobody_listens_every_address_is_named() {
    let (nobody, address) = crate::wire::bind();
    drop(nobody);
    let sent = Program::run(["send", &format!("{address},unix:/does/not/exist"), "--retry-for", "0"], b"one\n");
    assert_eq!(sent.code(), Some(1));
    for address in [&address[..], "unix:/does/not/exist"] {
        assert!(sent.stderr.contains(&format!("cannot connect to {address}: ")), "{}", sent.stderr);
    }
    // The line is read or not before nobody answered; where it was, it failed.
    let [accepted, settled, failed] = account(&sent);
    assert_eq!((settled, failed), (0, accepted), "{}", sent.stderr);
}

#[test]
fn a_spread_sends_over_all_of_its_connections_and_goes_on_without_one_that_is_killed() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (first, one) = Program::listen(&[]);
    let (second, two) = Program::listen(&[]);
    let address = format!("{one},{two}");
    // In flight are so few bytes that both always have some.
    let options =
        ["--spread", "--delivery", "acked", "--window", "4KiB", "--retry-for", "200ms", "--failed", &failed_file];
    let mut sender = Program::start(["send", &address].iter().chain(&options));
    let writer = Numbers::start(sender.take_stdin());
    first.wait_lines(1000);
    second.wait_lines(1000);
    // Stopped, it takes its share and prints none of it, so some are in flight when it is killed.
    first.stop();
    let lines = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count();
    let printed = second.wait_stdout("lines", |text| Some(lines(text)));
    second.wait_lines(printed + 1000);
    first.signal(Signal::KILL);
    let first = first.end();
    sender
        .wait_stderr("that it gives one up", |said| String::from_utf8_lossy(said).contains("giving up").then_some(()));
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(sent.code(), Some(1), "{}", sent.stderr);
    let [accepted, settled, failed] = account(&sent);
    assert!(accepted == written && failed > 0 && settled + failed == accepted, "{}", sent.stderr);
    let kept = undelimited(&std::fs::read(&failed_file).unwrap());
    assert_eq!(kept.len() as u64, failed);
    second.signal(Signal::TERM);
    let second = second.end();
    let (before, after) = (numbers(&first.stdout), numbers(&second.stdout));
    assert!(before.is_sorted_by(|one, next| one < next) && after.is_sorted_by(|one, next| one < next));
    let kept = kept.iter().map(|line| String::from_utf8_lossy(line).parse::<u64>().unwrap());
    let all: BTreeSet<u64> = before.into_iter().chain(after).chain(kept).collect();
    assert!(all.into_iter().eq(0..written), "printed, or kept as failed");
}

#[test]
fn a_spread_uses_a_connection_again_once_its_listener_is_back() {
    let (first, one) = Program::listen_on("127.0.0.31", &[]);
    let (second, two) = Program::listen(&[]);
    let mut sender = Program::start(["send", &format!("{one},{two}"), "--spread", "--delivery", "acked"]);
    first.signal(Signal::KILL);
    first.end();
    sender.wait_stderr("a loss", |said| String::from_utf8_lossy(said).contains("warning: ").then_some(()));
    let writer = Numbers::start(sender.take_stdin());
    second.wait_lines(100);
    let first = Program::start(["listen", &one]);
    first.address();
    first.wait_lines(100);
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(account(&sent), [written, written, 0], "{}", sent.stderr);
    assert_eq!(sent.code(), Some(0));
    let ends = [first, second].map(|listener| {
        listener.signal(Signal::TERM);
        numbers(&listener.end().stdout)
    });
    let all: BTreeSet<u64> = ends.iter().flatten().copied().collect();
    assert_eq!(ends.iter().map(Vec::len).sum::<usize>() as u64, written, "each once");
    assert!(all.into_iter().eq(0..written));
}
