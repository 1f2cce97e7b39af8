use std::io::{Read, Write};

use crate::metrics::metrics_of;
use crate::program::{Ended, Program, Signal};
use crate::wire::{self, u8_frames};

/// Waits until these words were drawn next to each other.
fn shows(top: &Program, words: &str) {
    top.wait_stdout(words, |screen| drawn(screen).contains(words).then_some(()));
}

/// What was drawn, word by word: without colours, and whatever it is that moves from one word to the next.
fn drawn(screen: &[u8]) -> String {
    let screen = String::from_utf8_lossy(screen);
    let mut parts = screen.split("\x1b[");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let Some(end) = part.find(|char: char| char.is_ascii_alphabetic()) else { continue };
        text += if part[end..].starts_with('H') { " " } else { "" };
        text += &part[end + 1..];
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A listener that has received three messages, and where its metrics are.
fn listener() -> (Program, String) {
    let listener = Program::start(["listen", "127.0.0.1:0", "--framing", "u8", "--metrics", "127.0.0.1:0"]);
    let metrics = metrics_of(&listener);
    wire::deliver(&listener.address(), &u8_frames(["one", "two", "three"]));
    listener.wait_lines(3);
    (listener, metrics)
}

#[test]
fn top_shows_a_listener_live_and_leaves_the_terminal_as_it_was() {
    let (listen, metrics) = listener();
    let (top, mut terminal) = Program::start_inside((100, 30), ["top", &metrics, "--every", "50ms"]);
    shows(&top, &format!("buffstreams top {metrics}"));
    shows(&top, "3 received 11 B 0 handler errors");
    shows(&top, "messages/s");
    assert!(!terminal.gathers_lines());
    wire::deliver(&listen.address(), &u8_frames(["more"; 1000]));
    shows(&top, "1,003 received 3.92 KiB");
    terminal.type_in(b"q");
    let ended = top.end();
    assert_eq!(ended.code(), Some(0));
    assert!(text_of(&ended.stdout).contains("\x1b[?1049h") && text_of(&ended.stdout).contains("\x1b[?1049l"));
    assert!(terminal.gathers_lines());
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn top_tries_on_until_somebody_answers_and_ends_at_a_signal_too() {
    let (free, nobody) = wire::bind();
    drop(free);
    let (top, terminal) = Program::start_inside((100, 30), ["top", &nobody, "--every", "50ms"]);
    shows(&top, "cannot be reached: ");
    let _listen = Program::start(["listen", "127.0.0.1:0", "--metrics", &nobody]);
    shows(&top, "receives on 127.0.0.1:");
    top.signal(Signal::TERM);
    let ended = top.end();
    assert_eq!(ended.code(), Some(0));
    assert!(terminal.gathers_lines());
}

#[test]
fn a_terminal_that_is_too_small_is_told_so() {
    let (_listen, metrics) = listener();
    let (top, mut terminal) = Program::start_inside((30, 5), ["top", &metrics]);
    shows(&top, "too small");
    terminal.type_in(b"\x03");
    assert_eq!(top.end().code(), Some(0), "control-C ends it");
}

#[test]
fn once_or_into_a_pipe_it_prints_the_numbers_and_ends() {
    let (listen, metrics) = listener();
    let url = format!("http://{metrics}/metrics");
    for arguments in [&["top", &metrics, "--once"][..], &["top", &metrics], &["top", &url]] {
        let ended = Program::run(arguments, b"");
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        let printed = text_of(&ended.stdout);
        assert!(printed.starts_with(&format!("receives on {}\n", listen.address())), "{printed}");
        assert!(printed.contains("\nmessages    3 received   11 B   0 handler errors\n"), "{printed}");
        assert!(!printed.contains('\x1b'), "{printed}");
    }
    let (free, nobody) = wire::bind();
    drop(free);
    let ended = Program::run(["top", &nobody, "--once"], b"");
    assert_eq!(ended.code(), Some(1));
    let said = ended.last_line();
    assert!(said.starts_with(&format!("error: {nobody} cannot be reached: ")) && said.contains("--metrics"), "{said}");
}

/// What `top --once` says of an address that answers with this.
fn told_of(body: &'static str) -> Ended {
    let (listener, address) = wire::bind();
    let answer = std::thread::spawn(move || {
        let mut stream = wire::accept(&listener);
        // Who is answered before having asked takes it for something else.
        let mut question = Vec::new();
        while !question.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            question.push(byte[0]);
        }
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        wire::wait_until_closed(&mut stream);
    });
    let ended = Program::run(["top", &address, "--once"], b"");
    answer.join().unwrap();
    ended
}

#[test]
fn what_is_no_metrics_of_this_library_is_told_so() {
    let ended = told_of("up 1\n");
    assert_eq!(ended.code(), Some(1));
    assert!(ended.last_line().contains("it answers, but tells nothing of buffstreams; "), "{}", ended.stderr);
}

#[test]
fn whoever_answers_cannot_command_the_terminal() {
    let ended = told_of("buffstreams_accepted_total{role=\"listener\",name=\"\x1b]0;owned\x07\"} 1\n");
    let printed = text_of(&ended.stdout);
    assert!(printed.starts_with("receives on ") && printed.contains("owned"), "{printed:?} {}", ended.stderr);
    assert!(!printed.contains(['\x1b', '\x07']), "{printed:?}");
}
