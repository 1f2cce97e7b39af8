use std::io::Write;

use crate::program::{Folder, Program, Signal, text};
use crate::wire::{self, u8_frames};

fn contains(text: &[u8], words: &str) -> Option<()> {
    String::from_utf8_lossy(text).contains(words).then_some(())
}

#[test]
fn listen_shows_the_rate_on_a_terminal_and_ends_with_its_summary() {
    let listener = Program::start_on_terminal(["listen", "127.0.0.1:0", "--framing", "u8"]);
    let mut stream = wire::connect(&listener.address());
    stream.write_all(&u8_frames(["hello"])).unwrap();
    listener.wait_stderr("a rate", |text| contains(text, "1 message, 5 B  1 msg/s"));
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.stdout, b"hello\n", "only messages go to standard output");
    assert!(ended.last_line().ends_with("received 1 messages, 5 bytes"), "{}", ended.stderr);
}

#[test]
fn send_shows_a_bar_over_a_file_on_a_terminal() {
    let folder = Folder::new();
    let file = folder.file("input", &b"all work and no play\n".repeat(2_000_000));
    let (listener, address) = wire::bind();
    let sender = Program::start_on_terminal(["send", &address, &file, "--retry-for", "0"]);
    // Nothing is read here, so the bar stops on its way.
    let stream = wire::accept(&listener);
    sender.wait_stderr("a bar", |text| contains(text, "% of 40.05 MiB"));
    drop((stream, listener));
    let ended = sender.end();
    assert!(ended.last_line().contains("accepted "), "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
}

#[test]
fn the_bar_of_send_stands_at_what_is_settled() {
    let folder = Folder::new();
    let file = folder.file("input", b"all work and no play\n");
    let address = format!("unix:{}", folder.path("later").display());
    let sender = Program::start_on_terminal(["send", &address, &file, "--delivery", "acked", "--retry-for", "1h"]);
    let bar = "0% of 21 B  0 messages, 0 B  0 msg/s, 0 B/s  (1 in hand)  (not connected)";
    sender.wait_stderr("a bar that has not moved", |text| contains(text, bar));
    let listener = Program::start(["listen", &address]);
    listener.wait_lines(1);
    let ended = sender.end();
    assert!(!ended.stderr.contains("100% of 21 B  0 messages"), "{}", ended.stderr);
    assert!(ended.last_line().ends_with("accepted 1, settled 1, failed 0"), "{}", ended.stderr);
}

#[test]
fn send_shows_a_rate_for_a_pipe_on_a_terminal_and_that_nobody_is_there() {
    let folder = Folder::new();
    let address = format!("unix:{}", folder.path("nobody").display());
    let mut sender = Program::start_on_terminal(["send", &address, "--retry-for", "1m"]);
    sender.write(b"hello\n");
    // What is shown is what was sent, and not what was read.
    sender.wait_stderr("the state", |text| {
        contains(text, "0 messages, 0 B  0 msg/s, 0 B/s  (1 in hand)  (not connected)")
    });
}

#[test]
fn the_progress_line_is_gone_after_a_signal_and_after_a_second_one_that_ends_it_at_once() {
    /// The cursor is at the beginning of an empty line.
    const CLEAN: &str = "\r\x1b[2K";
    let (stopped, address) = Program::listen(&[]);
    let mut sender = Program::start_on_terminal(["send", &address, "--delivery", "acked"]);
    sender.write(b"hello\n");
    sender.wait_stderr("that it is acknowledged", |text| contains(text, "1 message, 6 B"));
    stopped.stop();
    sender.write(b"hello\n");
    let is_drawn = |text: &[u8]| {
        let last = String::from_utf8_lossy(text);
        let last = last.strip_suffix('\r')?.rsplit('\r').next()?;
        (last.contains("1 message, 6 B") && last.contains("(1 in hand)")).then_some(())
    };
    sender.wait_stderr("a line, with the cursor at its beginning", is_drawn);
    sender.signal(Signal::INT);
    sender.wait_stderr("what it waits for", |text| contains(text, "Ctrl-C again ends it at once"));
    sender.signal(Signal::TERM);
    let ended = sender.end();
    assert_eq!(ended.code(), Some(143), "{}", ended.stderr);
    // Nothing came behind it, or a warning with its line.
    assert!([CLEAN, "\r\n"].iter().any(|end| ended.stderr.ends_with(end)), "{:?}", ended.stderr);

    let listener = Program::start_on_terminal(["listen", "127.0.0.1:0"]);
    listener.wait_stderr("a line, with the cursor at its beginning", |text| {
        contains(text, "msg/s").filter(|()| text.ends_with(b"\r"))
    });
    listener.signal(Signal::INT);
    let ended = listener.end();
    assert!(ended.stderr.ends_with(&format!("{CLEAN}received 0 messages, 0 bytes\r\n")), "{:?}", ended.stderr);
}

#[test]
fn what_strangers_send_cannot_command_the_terminal() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    // A title for the window, a colour, and a sequence without an escape character.
    let hostile: &[u8] = b"\x1b]0;owned\x07\x1b[31m\xc2\x9b2J\x9b2J \xc3\xbc\tend";
    let shown = "\\u{1b}]0;owned\\u{7}\\u{1b}[31m\\u{9b}2J\\x9b2J \u{fc}\tend";
    let recorder = Program::start(["record", "127.0.0.1:0", &file, "--framing", "u8", "--count", "1"]);
    wire::deliver(&recorder.address(), &u8_frames([hostile]));
    recorder.end();
    assert_eq!(Program::run(["export", &file, "--output", "lines"], b"").stdout, [hostile, b"\n"].concat());

    let is_shown = |program: &Program| {
        program.wait_stdout("the message", |text| contains(text, shown));
        let no_command = |text: &[u8]| !text.iter().any(|byte| [0x1b, 0x07, 0x9b].contains(byte));
        program.wait_stdout("no command", |text| no_command(text).then_some(()));
    };
    let (listener, _terminal) = Program::start_inside((80, 24), ["listen", "127.0.0.1:0", "--framing", "u8"]);
    wire::deliver(&listener.address(), &u8_frames([hostile]));
    is_shown(&listener);
    for output in ["lines", "delimited"] {
        is_shown(&Program::start_inside((80, 24), ["export", &file, "--output", output]).0);
    }
    let options = ["tap", "127.0.0.1:0", &listener.address(), "--framing", "u8"];
    let (tap, _terminal) = Program::start_inside((80, 24), options);
    wire::deliver(&tap.address(), &u8_frames([hostile]));
    is_shown(&tap);
}
