use crate::program::{Program, Signal, data};

/// The commands that the program says it has.
pub(crate) fn commands() -> Vec<String> {
    let help = String::from_utf8(Program::run(["--help"], b"").stdout).unwrap();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    let commands: Vec<_> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    assert!(commands.len() >= 7, "{help}");
    commands
}

#[test]
fn each_subcommand_shows_an_example_in_its_help() {
    for subcommand in commands() {
        let help = Program::run([&subcommand, "--help"], b"");
        let text = String::from_utf8(help.stdout).unwrap();
        assert_eq!(help.status.code(), Some(0));
        let (_, examples) = text.split_once("Examples:").expect("help has examples");
        assert!(examples.contains(&format!("buffstreams {subcommand}")), "{text}");
        assert!(!is_coloured(&text), "not a terminal: {text}");
    }
}

/// Whether there is a sequence that changes the look of text; one that moves the cursor is none.
fn is_coloured(text: &str) -> bool {
    text.split("\x1b[")
        .skip(1)
        .any(|after| after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m'))
}

#[test]
fn there_are_colours_on_a_terminal_and_none_with_no_color() {
    let wrong = ["listen", ":0", "--count=few"];
    for (no_color, expected) in [("", true), ("1", false)] {
        let environment = [("TERM", "xterm-256color"), ("NO_COLOR", no_color)];
        let ended = Program::start_on_terminal_in(&environment, wrong).end();
        assert!(ended.stderr.contains("few"), "{}", ended.stderr);
        assert_eq!(is_coloured(&ended.stderr), expected, "NO_COLOR={no_color:?}: {}", ended.stderr);
    }
    let ended = Program::run(wrong, b"");
    assert!(!is_coloured(&ended.stderr), "not a terminal: {}", ended.stderr);

    let environment = [("TERM", "xterm-256color"), ("NO_COLOR", "1")];
    let listen = Program::start_on_terminal_in(&environment, ["listen", "127.0.0.1:0"]);
    listen.wait_stderr("a rate", |said| String::from_utf8_lossy(said).contains("msg/s").then_some(()));
    listen.signal(Signal::TERM);
    let ended = listen.end();
    assert!(!is_coloured(&ended.stderr), "{}", ended.stderr);
}

#[test]
fn help_names_every_framing() {
    let help = Program::run(["listen", "--help"], b"");
    let text = String::from_utf8(help.stdout).unwrap();
    for name in ["buffstreams", "varint", "u8", "u16be", "u16le", "u32be", "u32le", "u64be", "u64le"] {
        assert!(text.contains(name), "{name} in {text}");
    }
}

#[test]
fn what_cannot_be_used_ends_with_2_and_says_why() {
    let gtfs = data("gtfs-realtime/gtfs-realtime.proto");
    let readme = data("gtfs-realtime/README.md");
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["receive"], "receive"),
        (&["listen"], "<ADDRESS>"),
        (&["listen", "no port"], "no port"),
        (&["listen", "5031"], "write \":5031\""),
        (&["send", "http://127.0.0.1:5031"], "leave out \"http://\""),
        (&["listen", ":0", "--framing", "u24"], "u24"),
        (&["listen", ":0", "--max-message-size", "64KB"], "64KiB"),
        (&["listen", ":0", "--framing", "u8", "--max-message-size", "256"], "255"),
        (&["listen", ":0", "--framing", "u16le", "--max-message-size", "64KiB"], "65535"),
        (&["listen", ":0", "--count", "-1"], "-1"),
        (&["listen", ":0", "--output", "yaml"], "yaml"),
        (&["send", ":1", "--spool", "outgoing"], "--delivery acked"),
        (&["send", ":1", "--delivery", "acked", "--spool-size", "1MiB"], "--spool DIR"),
        (&["failed", "outgoing"], "<ACTION>"),
        (&["failed", "outgoing", "burn"], "burn"),
        (&["listen", ":0", "--output", "json"], "--type"),
        (&["listen", ":0", "--type", "pkg.Message"], "--proto"),
        (&["listen", ":0", "--proto", &gtfs], "--type"),
        (&["listen", ":0", "--proto", &gtfs, "--type", "transit_realtime.Nothing"], "transit_realtime.FeedMessage"),
        (&["listen", ":0", "--proto", &readme, "--type", "pkg.Message"], "README.md"),
        (&["listen", ":0", "--proto", "nowhere.proto", "--type", "pkg.Message"], "nowhere.proto"),
        (&["send"], "<ADDRESS>"),
        (&["send", "localhost:1,localhost"], "\"localhost\" has no port"),
        (&["send", "localhost:1,"], "has no port"),
        (&["listen", "localhost:1,localhost:2"], "more than one"),
        (&["send", "localhost:1", "--patience", "1m"], "--delivery acked"),
        (
            &["send", "localhost:1", "--spread", "--delivery", "acked", "--spool", "outgoing"],
            "keeps the messages of one",
        ),
        (&["send", "localhost:1", "--spread", "--delivery", "acked", "--patience", "1m"], "goes to another address"),
        (&["send", "localhost:1", "--input", "none"], "none"),
        (&["send", "localhost:1", "--input", "json"], "--type"),
        (&["send", "localhost:1", "--retry-for", "30"], "500ms"),
        (&["send", "localhost:1", "--delivery", "twice"], "twice"),
        (&["send", "localhost:1", "--window", "1MiB"], "--delivery acked"),
        (&["send", "localhost:1", "--delivery", "sent", "--window", "1MiB"], "--delivery acked"),
        (&["send", "localhost:1", "--delivery", "acked", "--window", "1MB"], "64KiB"),
        (&["send", "localhost:1", "--delivery", "acked", "--framing", "u8"], "varint"),
        (&["send", "localhost:1", "--delivery", "acked", "--framing", "u16be"], "varint"),
        (&["send", "localhost:1", "--delivery", "acked", "--framing", "u16le"], "varint"),
        (&["send", "localhost:1", "--framing", "u8", "--max-message-size", "1MiB"], "255"),
        (&["listen", ":0", "--tls-cert", "server.pem"], "--tls-key"),
        (&["listen", ":0", "--tls-key", "server.key"], "--tls-cert"),
        (&["listen", ":0", "--tls-ca", "senders.pem"], "--tls-cert"),
        (&["listen", ":0", "--max-handshakes", "9"], "--tls-cert"),
        (&["listen", ":0", "--allow", "example.com"], "10.0.0.0/8"),
        (&["listen", ":0", "--max-message-rate", "0"], "from 1"),
        (&["listen", ":0", "--frame-deadline", "30"], "or none"),
        (&["listen", ":0", "--session-window", "4MB"], "4096"),
        (&["send", "localhost:1", "--tls", "--tls-cert", "sender.pem"], "--tls-key"),
        (&["send", "localhost:1", "--tls-name", "collector.example"], "--tls-ca"),
        (&["send", "localhost:1", "--tls-cert", "sender.pem", "--tls-key", "sender.key"], "--tls-ca"),
        (&["send", "localhost:1", "--tls", "--tls-name", "no name"], "no name"),
        (&["send", "unix:socket", "--tls"], "--tls-name"),
        (&["send", "localhost:1,unix:socket", "--tls"], "--tls-name"),
        (&["bench"], "<ADDRESS>"),
        (&["bench", ":1", "--rate", "fast"], "10k"),
        (&["bench", ":1", "--size", "8"], "16"),
        (&["bench", ":1", "--size", "4KiB..64"], "smaller"),
        (&["bench", ":1", "--size", "8KiB"], "--max-message-size 8192"),
        (&["bench", ":1", "--connections", "0"], "0"),
        (&["bench", ":1", "--duration", "0"], "--duration"),
        (&["bench", ":1", "--by", "acks", "--delivery", "sent"], "--delivery acked"),
        (&["bench", ":1", "--by", "acks", "--framing", "u8"], "varint"),
        (&["tap", ":0"], "<TARGET>"),
        (&["tap", ":0", ":1", "--output", "delimited"], "hex"),
        (&["tap", ":0", ":1", "--output", "json"], "--type"),
        (&["tap", ":0", ":1", "--max-message-size", "1MiB"], "--framing"),
        (&["record", ":0"], "<FILE>"),
        (&["replay", "monday.rec"], "<ADDRESS>"),
        (&["replay", "monday.rec", ":1", "--speed", "0"], "0.5x"),
        (&["replay", "monday.rec", ":1", "--framing", "u8", "--max-message-size", "256"], "255"),
        (&["replay", "monday.rec", ":1", "--framing", "u8", "--delivery", "acked"], "varint"),
        (&["export", "monday.rec", "--output", "json"], "--type"),
        (&["listen", ":0", "--metrics", "9100"], "write :9100"),
        (&["listen", ":0", "--metrics", "::1:9100"], "in brackets"),
        (&["send", ":1", "--metrics", "unix:socket"], "host:port"),
        (&["top"], "<METRICS-ADDRESS>"),
        (&["top", ":9100", "--every", "0"], "1s"),
        (&["demo", "--seconds", "0"], "0"),
        (&["completions", "cmd"], "bash"),
    ];
    for (arguments, named) in cases {
        let ended = Program::run(*arguments, b"");
        assert_eq!(ended.code(), Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(named), "{arguments:?} should name {named}: {}", ended.stderr);
        assert!(ended.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_standard_output_that_takes_nothing_is_named() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else { return };
    for arguments in [&["completions", "bash"][..], &["man"]] {
        let ended = Program::start_into(full.try_clone().unwrap(), arguments).end();
        assert_eq!(ended.code(), Some(1));
        assert!(ended.stderr.starts_with("error: standard output: No space left"), "{}", ended.stderr);
    }
}
