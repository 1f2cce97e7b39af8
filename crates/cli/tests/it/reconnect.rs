use std::collections::BTreeSet;
use std::io::Write;
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::program::{Ended, Folder, Program, Signal, text};
use crate::wire::undelimited;

/// Writes numbered lines, one at a time, until it is told to stop.
pub(crate) struct Numbers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Numbers {
    pub(crate) fn start(mut stdin: ChildStdin) -> Numbers {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) || writeln!(stdin, "{number}").is_err() {
                    return number;
                }
                if number % 100 == 0 {
                    // A pace, so that the stream lasts; nothing waits for it.
                    thread::sleep(Duration::from_millis(1));
                }
            }
            0
        });
        Numbers { stop, thread }
    }

    /// How many lines were written.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Accepted, settled, failed.
pub(crate) fn account(ended: &Ended) -> [u64; 3] {
    let numbers: Vec<u64> =
        ended.last_line().split(' ').filter_map(|word| word.trim_end_matches(',').parse().ok()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{}", ended.stderr))
}

pub(crate) fn numbers(printed: &[u8]) -> Vec<u64> {
    std::str::from_utf8(printed).unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

fn ascending(numbers: &[u64]) -> bool {
    numbers.is_sorted_by(|left, right| left < right)
}

#[test]
fn a_listener_that_restarts_gets_the_rest_and_the_account_adds_up() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (first, address) = Program::listen_on("127.0.0.2", &[]);
    let mut sender = Program::start(["send", &address, "--retry-for", "1m", "--failed", &failed_file]);
    let writer = Numbers::start(sender.take_stdin());

    first.wait_lines(1000);
    first.signal(Signal::TERM);
    let first = first.end();
    assert_eq!(first.code(), Some(0), "{}", first.stderr);

    let second = Program::start(["listen", &address]);
    second.address();
    second.wait_lines(1000);
    let written = writer.stop();
    let sent = sender.end();
    second.signal(Signal::TERM);
    let second = second.end();

    let [accepted, settled, failed] = account(&sent);
    assert_eq!(accepted, written, "{}", sent.stderr);
    assert_eq!(accepted, settled + failed);
    let failures = undelimited(&std::fs::read(&failed_file).unwrap());
    assert_eq!(failures.len() as u64, failed);
    assert_eq!(sent.code(), Some(if failed == 0 { 0 } else { 1 }));

    let mut printed = numbers(&first.stdout);
    printed.extend(numbers(&second.stdout));
    assert!(ascending(&printed), "in order, and nothing twice");
    assert_eq!(printed.last(), Some(&(written - 1)), "the last line written arrived");
    let known: BTreeSet<u64> = printed.iter().copied().collect();
    for failure in &failures {
        let number: u64 = std::str::from_utf8(failure).unwrap().parse().unwrap();
        assert!(!known.contains(&number), "{number} is called failed and was printed");
    }
    assert!(settled >= printed.len() as u64, "whatever was printed is settled");
}

#[test]
fn a_listener_that_never_comes_back_leaves_everything_else_in_the_file() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (listener, address) = Program::listen_on("127.0.0.3", &[]);
    let mut sender = Program::start(["send", &address, "--retry-for", "500ms", "--failed", &failed_file]);
    let writer = Numbers::start(sender.take_stdin());
    listener.wait_lines(1000);
    listener.signal(Signal::KILL);
    drop(listener);

    let sent = sender.end();
    let written = writer.stop();
    assert_eq!(sent.code(), Some(1));
    let [accepted, settled, failed] = account(&sent);
    assert!(accepted <= written && failed > 0, "{}", sent.stderr);
    assert_eq!(accepted, settled + failed);
    let mut failures: Vec<u64> = undelimited(&std::fs::read(&failed_file).unwrap())
        .iter()
        .map(|message| std::str::from_utf8(message).unwrap().parse().unwrap())
        .collect();
    // The one that was read last may be refused while those before it are still being given up.
    failures.sort_unstable();
    assert_eq!(failures, (settled..accepted).collect::<Vec<_>>(), "what was settled comes before what failed");
}
