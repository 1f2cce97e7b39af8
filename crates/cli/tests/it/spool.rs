use std::fs;
use std::path::Path;

use buffstreams::{HandlerError, blocking};

use crate::program::{Ended, Folder, Program, Signal, text};
use crate::reconnect::{Numbers, account, numbers};

const ACKED: [&str; 3] = ["--delivery", "acked", "--spool"];

fn spooled<'a>(address: &'a str, spool: &'a str, options: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    ["send", address].into_iter().chain(ACKED).chain([spool]).chain(options.iter().copied())
}

fn send(address: &str, spool: &str, options: &[&str], input: &[u8]) -> Ended {
    Program::run(spooled(address, spool, options), input)
}

fn lines(range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(|number| format!("{number}\n")).collect::<String>().into_bytes()
}

/// An address where nobody listens, and later somebody may.
fn free_address(host: &str) -> String {
    std::net::TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().to_string()
}

#[test]
fn input_is_kept_while_nobody_listens_and_an_empty_input_drains_it() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.11");
    let file = folder.file("lines", &lines(0..5_000));
    let sent = send(&address, &spool, &["--retry-for", "1s", &file], b"");
    assert!(sent.stderr.starts_with("spool: 0 messages to resume\n"), "{}", sent.stderr);
    assert!(sent.stderr.contains("spool: 5000 messages are kept"), "{}", sent.stderr);
    assert_eq!(sent.last_line(), "accepted 5000, settled 0, failed 0");
    assert_eq!(sent.code(), Some(1), "nothing arrived");

    let listener = Program::start(["listen", &address, "--count", "5000"]);
    listener.address();
    let drained = send(&address, &spool, &[], b"");
    assert!(drained.stderr.starts_with("spool: 5000 messages to resume\n"), "{}", drained.stderr);
    assert_eq!(drained.last_line(), "accepted 5000, settled 5000, failed 0");
    assert_eq!(drained.code(), Some(0), "{}", drained.stderr);
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..5_000));

    let nothing = send(&address, &spool, &["--retry-for", "0"], b"");
    assert!(nothing.stderr.starts_with("spool: 0 messages to resume\n"), "{}", nothing.stderr);
    assert_eq!(nothing.last_line(), "accepted 0, settled 0, failed 0");
}

#[test]
fn a_sender_that_is_killed_again_and_again_leaves_what_it_accepted_to_the_next() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let (listener, address) = Program::listen_on("127.0.0.12", &[]);
    let mut printed = 0;
    for round in 0..4 {
        let mut sender = Program::start(spooled(&address, &spool, &[]));
        let writer = Numbers::start(sender.take_stdin());
        printed += 3_000;
        listener.wait_lines(printed);
        sender.signal(Signal::KILL);
        let ended = sender.end();
        assert!(ended.stderr.starts_with("spool: "), "{round}: {}", ended.stderr);
        writer.stop();
        // What it had accepted comes with the next one, before anything else.
        let drained = send(&address, &spool, &[], b"");
        let [accepted, settled, failed] = account(&drained);
        assert_eq!((accepted, failed), (settled, 0), "{}", drained.stderr);
        printed = listener.wait_stdout("a whole line", |stdout| {
            stdout.ends_with(b"\n").then(|| stdout.iter().filter(|byte| **byte == b'\n').count())
        });
    }
    listener.signal(Signal::TERM);
    let printed = numbers(&listener.end().stdout);
    let mut runs = 0;
    for (index, number) in printed.iter().enumerate() {
        match number {
            0 => runs += 1,
            number => assert_eq!(*number, printed[index - 1] + 1, "in order, none missing and none twice"),
        }
    }
    assert_eq!(runs, 4, "each input from its start");
}

#[test]
fn one_send_at_a_time_has_a_spool() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let (listener, address) = Program::listen(&[]);
    let mut first = Program::start(spooled(&address, &spool, &[]));
    first.write(b"hello\n");
    listener.wait_lines(1);
    let second = send(&address, &spool, &[], b"again\n");
    assert_eq!(second.code(), Some(1));
    assert!(second.last_line().contains("in use") && second.last_line().contains(&spool), "{}", second.stderr);
    drop(first.take_stdin());
    assert_eq!(first.end().last_line(), "accepted 1, settled 1, failed 0");
}

#[test]
fn what_cannot_be_sent_counts_as_ever() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let (listener, address) = Program::listen(&["--count", "2"]);
    let long = "x".repeat(5_000);
    let sent = send(&address, &spool, &[], format!("one\n{long}\ntwo\n").as_bytes());
    assert_eq!(sent.last_line(), "accepted 3, settled 2, failed 1", "{}", sent.stderr);
    assert_eq!(sent.code(), Some(1));
    assert_eq!(listener.end().stdout, b"one\ntwo\n");
}

#[test]
fn a_full_spool_lets_the_input_wait() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.13");
    let mut sender = Program::start(spooled(&address, &spool, &["--spool-size", "16KiB", "--retry-for", "1m"]));
    sender.write_all_and_close(&lines(0..20_000));
    let listener = Program::start(["listen", &address, "--count", "20000"]);
    let sent = sender.end();
    assert_eq!(sent.last_line(), "accepted 20000, settled 20000, failed 0", "{}", sent.stderr);
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..20_000));
}

#[test]
fn an_interruption_keeps_what_was_read() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.14");
    let mut sender = Program::start(spooled(&address, &spool, &["--retry-for", "1m"]));
    sender.write(&lines(0..1_000));
    // Accepted when it is on disk: the file grows with it.
    let file = folder.path("spool").join("spool.redb");
    until(|| fs::metadata(&file).is_ok_and(|file| file.len() > 4_000) && contains(&file, b"999"));
    sender.signal(Signal::INT);
    let ended = sender.end();
    assert_eq!(ended.last_line(), "accepted 1000, settled 0, failed 0", "{}", ended.stderr);
    assert_eq!(ended.code(), Some(1));
    let listener = Program::start(["listen", &address, "--count", "1000"]);
    listener.address();
    assert_eq!(send(&address, &spool, &[], b"").code(), Some(0));
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..1_000));
}

fn until(mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + crate::program::DEADLINE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not in time");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn contains(path: &Path, bytes: &[u8]) -> bool {
    fs::read(path).unwrap().windows(bytes.len()).any(|window| window == bytes)
}

#[test]
fn failed_messages_are_listed_sent_again_and_dropped() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let listener = blocking::Listener::bind("127.0.0.1:0").unwrap();
    let server = listener.spawn(|message: &[u8]| match message {
        b"good" => Ok(()),
        _ => Err(HandlerError::rejected(42, "no\x1b[2Jway")),
    });
    let address = server.local_address().to_string();
    let sent = send(&address, &spool, &[], b"good\nbad\ngood\nworse\nworst\n");
    assert_eq!(sent.last_line(), "accepted 5, settled 2, failed 3", "{}", sent.stderr);
    assert!(sent.stderr.contains(&format!("buffstreams failed {spool} list")), "{}", sent.stderr);
    assert_eq!(sent.code(), Some(1));

    let failed = |arguments: &[&str]| Program::run(["failed", &spool].iter().chain(arguments), b"");
    let list = |arguments: &[&str]| -> Vec<Vec<String>> {
        let ended = failed(&[&["list"], arguments].concat());
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        let text = String::from_utf8(ended.stdout).unwrap();
        text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    };
    let listed = list(&[]);
    assert_eq!(listed.iter().map(|line| line[0].as_str()).collect::<Vec<_>>(), ["2", "4", "5"]);
    assert_eq!(listed[1][2..], ["5 bytes", "42", "no\\u{1b}[2Jway", "worse"]);
    assert!(listed[0][1].ends_with('Z'), "{listed:?}");

    assert_eq!(failed(&["drop", "5"]).last_line(), "1 message dropped");
    let missing = failed(&["send", "5"]);
    assert_eq!(missing.code(), Some(1));
    assert!(missing.stderr.contains("no failed message 5"), "{}", missing.stderr);
    assert_eq!(list(&[]).len(), 2);

    // A listener that takes everything.
    let again = failed(&["send"]);
    assert!(again.last_line().starts_with("2 messages go with the next send"), "{}", again.stderr);
    assert!(list(&[]).is_empty());
    let (listener, address) = Program::listen(&["--count", "2"]);
    let drained = send(&address, &spool, &[], b"");
    assert!(drained.stderr.starts_with("spool: 2 messages to resume\n"), "{}", drained.stderr);
    assert_eq!(drained.code(), Some(0));
    assert_eq!(listener.end().stdout, b"bad\nworse\n");

    let nowhere = Program::run(["failed", &text(&folder.path("nowhere")), "list"], b"");
    assert_eq!(nowhere.code(), Some(1));
    assert!(!folder.path("nowhere").exists(), "to look is not to make one");
}

#[test]
fn damage_is_told_and_the_rest_is_sent() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.15");
    for line in ["the first line\n", "the second line\n", "the third line\n"] {
        let sent = send(&address, &spool, &["--retry-for", "0"], line.as_bytes());
        assert_eq!(sent.code(), Some(1));
    }
    let file = folder.path("spool").join("spool.redb");
    let mut content = fs::read(&file).unwrap();
    let wanted = b"the second line";
    let places: Vec<_> = (0..content.len()).filter(|at| content[*at..].starts_with(wanted)).collect();
    places.into_iter().for_each(|at| content[at] ^= 1);
    fs::write(&file, content).unwrap();

    let listener = Program::start(["listen", &address, "--count", "2"]);
    listener.address();
    let sent = send(&address, &spool, &[], b"");
    assert!(sent.stderr.starts_with("spool: 2 messages to resume\n"), "{}", sent.stderr);
    assert!(sent.errors()[0].contains("messages 2 to 2 are damaged on disk, and lost"), "{}", sent.stderr);
    assert_eq!(sent.last_line(), "accepted 2, settled 2, failed 0");
    assert_eq!(sent.code(), Some(1), "something was lost");
    assert_eq!(listener.end().stdout, b"the first line\nthe third line\n");
}

#[test]
fn an_interruption_is_heard_while_the_spool_is_full() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.16");
    let mut sender = Program::start(spooled(&address, &spool, &["--spool-size", "16KiB", "--retry-for", "10m"]));
    sender.write_all_and_close(&lines(0..20_000));
    let file = folder.path("spool").join("spool.redb");
    until(|| fs::metadata(&file).is_ok() && contains(&file, b"1999"));
    sender.signal(Signal::INT);
    let ended = sender.end();
    let [accepted, settled, failed] = account(&ended);
    assert_eq!(ended.code(), Some(1));
    assert!(settled == 0 && failed < accepted, "{}", ended.last_line());

    let listener = Program::start(["listen", &address]);
    listener.address();
    let drained = send(&address, &spool, &[], b"");
    assert_eq!(account(&drained), [accepted - failed, accepted - failed, 0]);
    listener.signal(Signal::TERM);
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..accepted - failed), "what was kept is the beginning");
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_takes_no_more_ends_it_with_an_account_and_loses_nothing() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let address = free_address("127.0.0.17");
    let file = folder.file("lines", &lines(0..200_000));
    let arguments = ["send", &address, "--delivery", "acked", "--spool", &spool, &file];
    let ended = Program::start_on_full_disk(1024, arguments).end();
    let (errors, last) = (&ended.stderr, ended.last_line());
    assert_eq!(ended.code(), Some(1), "{last}");
    assert!(
        errors.contains(&spool) && errors.contains("too large") && errors.contains("is safe there"),
        "{}",
        &errors[..errors.len().min(2_000)]
    );
    let [accepted, _, failed] = account(&ended);
    assert!(accepted > failed, "{last}");

    let listener = Program::start(["listen", &address]);
    listener.address();
    let drained = send(&address, &spool, &[], b"");
    assert_eq!(drained.code(), Some(0), "{}", drained.stderr);
    let resumed = account(&drained)[1];
    assert!(resumed >= accepted - failed, "all that was accepted: {resumed} of {last}");
    listener.signal(Signal::TERM);
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..resumed));
}
