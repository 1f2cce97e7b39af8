//! The limits of `listen`, as options: strangers are refused and told of, and whoever keeps within them is served.

use std::io::Write;
use std::time::Instant;

use crate::program::{Program, Signal};
use crate::wire::{self, u8_frames};

#[test]
fn who_is_not_allowed_is_refused_and_told_of_at_a_bounded_rate() {
    const STRANGERS: usize = 300;
    let (listener, address) = Program::listen(&["--allow", "192.0.2.0/24", "--allow", "2001:db8::1"]);
    let begun = Instant::now();
    for _ in 0..STRANGERS {
        wire::wait_until_closed(&mut wire::connect(&address));
    }
    listener.signal(Signal::TERM);
    let took = begun.elapsed();
    let ended = listener.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let lines: Vec<_> = ended.stderr.lines().collect();
    let [.., refused, received] = lines[..] else { panic!("{}", ended.stderr) };
    assert_eq!(refused, format!("refused {STRANGERS} connections: {STRANGERS} not allowed"));
    assert_eq!(received, "received 0 messages, 0 bytes");
    let told = lines.iter().filter(|line| line.starts_with("warning: connection refused")).count();
    let allowed = 20.0 + 20.0 * (took.as_secs_f64() + 1.0);
    assert!(told > 0 && told as f64 <= allowed, "{told} lines in {took:?}: {}", ended.stderr);
}

#[test]
fn connections_over_a_limit_are_refused_and_the_others_are_served() {
    for option in ["--max-connections", "--max-connections-per-address"] {
        let (listener, address) = Program::listen(&["--framing", "u8", option, "1"]);
        let mut kept = wire::connect(&address);
        kept.write_all(&u8_frames(["one"])).unwrap();
        listener.wait_lines(1);
        wire::wait_until_closed(&mut wire::connect(&address));
        kept.write_all(&u8_frames(["two"])).unwrap();
        listener.wait_lines(2);
        listener.signal(Signal::TERM);
        let ended = listener.end();
        assert_eq!(ended.stdout, b"one\ntwo\n", "{option}");
        assert!(ended.stderr.contains("refused 1 connection: 1 too many"), "{option}: {}", ended.stderr);
    }
}

#[test]
fn who_is_too_slow_is_cut_off_and_told_of() {
    let cases: [(&str, &[u8], &str); 3] = [
        ("--frame-deadline", &[9, b'x'], "a frame took longer"),
        ("--idle-deadline", &[1, b'x'], "nothing was received for"),
        ("--receive-memory", &[200; 150], "exceed the 100 bytes"),
    ];
    for (option, bytes, words) in cases {
        let value = if option == "--receive-memory" { "100" } else { "200ms" };
        let (listener, address) = Program::listen(&["--framing", "u8", option, value]);
        let mut stranger = wire::connect(&address);
        stranger.write_all(bytes).unwrap();
        wire::wait_until_closed(&mut stranger);
        let told = |text: &[u8]| String::from_utf8_lossy(text).contains(words).then_some(());
        listener.wait_stderr(words, told);
        listener.signal(Signal::TERM);
        assert_eq!(listener.end().code(), Some(0), "{option}");
    }
    // Where bytes may be the beginning of a session, that has a deadline of its own.
    let (listener, address) = Program::listen(&["--handshake-deadline", "200ms", "--frame-deadline", "none"]);
    let mut stranger = wire::connect(&address);
    stranger.write_all(&[0xff; 10]).unwrap();
    wire::wait_until_closed(&mut stranger);
    listener.wait_stderr("a line about it", |text| {
        String::from_utf8_lossy(text).contains("the handshake was not over").then_some(())
    });
}

#[test]
fn a_rate_slows_a_sender_down_and_loses_nothing() {
    let lines: String = (0..60).map(|number| format!("{number}\n")).collect();
    for delivery in ["sent", "acked"] {
        let options = ["--max-message-rate", "20", "--session-window", "64KiB", "--session-memory", "1MiB"];
        let (listener, address) = Program::listen(&options);
        let begun = Instant::now();
        let sent = Program::run(["send", &address, "--delivery", delivery], lines.as_bytes());
        assert_eq!(sent.last_line(), "accepted 60, settled 60, failed 0");
        listener.wait_lines(60);
        assert!(begun.elapsed().as_secs_f64() >= 2.5, "60 came within {:?}", begun.elapsed());
        listener.signal(Signal::TERM);
        assert_eq!(String::from_utf8(listener.end().stdout).unwrap(), lines);
    }
}

#[test]
fn a_sender_that_hangs_at_a_signal_is_told_of_and_nothing_has_failed() {
    let (listener, address) = Program::listen(&[]);
    let mut sender = Program::start(["send", &address, "--delivery", "acked"]);
    sender.write(b"one\n");
    listener.wait_lines(1);
    sender.stop();
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("1 sender did not answer within 5s"), "{}", ended.stderr);
    assert_eq!(ended.last_line(), "received 1 messages, 3 bytes");
    sender.signal(Signal::KILL);
    sender.signal(Signal::CONT);
}
