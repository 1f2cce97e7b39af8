use crate::program::{Folder, Program, Signal, data, text};

/// A `listen` on any free port that takes its options from this file.
fn listen(config: &str, options: &[&str]) -> (Program, String) {
    Program::listen(&[&["--config", config], options].concat())
}

#[test]
fn both_sides_take_their_options_from_one_file() {
    let folder = Folder::new();
    let config = folder.file(
        "buffstreams.toml",
        b"framing = 'varint'\nmax-message-size = '64KiB'\n[listen]\noutput = 'hex'\ncount = 2\n[send]\nretry-for = 0\n",
    );
    let (listen, address) = listen(&config, &[]);
    let long = "x".repeat(5000);
    let sent = Program::run(["send", &address, "--config", &config], format!("ab\n{long}\n").as_bytes());
    assert_eq!(sent.last_line(), "accepted 2, settled 2, failed 0", "{}", sent.stderr);
    let ended = listen.end();
    assert_eq!(String::from_utf8(ended.stdout).unwrap(), format!("6162\n{}\n", "78".repeat(5000)));
}

#[test]
fn what_is_typed_goes_before_what_the_file_says() {
    let folder = Folder::new();
    let config = folder.file("buffstreams.toml", b"[listen]\noutput = 'hex'\ncount = 7\nno-sessions = true\n");
    let (listen, address) = listen(&config, &["--output", "lines", "--count=1"]);
    let refused = Program::run(["send", &address, "--delivery", "acked", "--retry-for", "0"], b"hello\n");
    assert_eq!(refused.code(), Some(1), "no-sessions stands: {}", refused.stderr);
    Program::run(["send", &address], b"hello\n");
    assert_eq!(listen.end().stdout, b"hello\n");
}

#[test]
fn lists_and_what_needs_something_else_can_stand_in_the_file() {
    let folder = Folder::new();
    let proto = data("gtfs-realtime/gtfs-realtime.proto");
    let config = folder.file(
        "buffstreams.toml",
        format!("proto = ['{proto}']\ntype = 'transit_realtime.FeedHeader'\n[listen]\noutput = 'json'\n").as_bytes(),
    );
    let (listen, address) = listen(&config, &["--count", "1"]);
    Program::run(["--config", &config, "send", &address], b"{\"gtfsRealtimeVersion\":\"2.0\"}\n");
    assert_eq!(listen.end().stdout, b"{\"gtfsRealtimeVersion\":\"2.0\"}\n");
}

#[test]
fn a_file_that_cannot_be_used_ends_it_with_2_and_a_sentence_that_names_it() {
    let folder = Folder::new();
    let nowhere = text(&folder.path("nowhere.toml"));
    let cases: [(&[u8], &[&str]); 7] = [
        (b"[listen]\nmax-mesage-size = 7", &["`max-mesage-size` in [listen]", "max-message-size", "framing"]),
        (b"max-mesage-size = 7", &["`max-mesage-size`", "no command"]),
        (b"[receive]\ncount = 7", &["[receive]", "[listen]"]),
        (b"count = -1", &["-1", "`count` stands in"]),
        (b"output = 'yaml'", &["yaml", "`output` stands in"]),
        (b"count = ", &["line 1"]),
        (b"no-sessions = 'sometimes'", &["`no-sessions` must be true or false"]),
    ];
    for (content, says) in cases {
        let config = folder.file("wrong.toml", content);
        let ended = Program::run(["listen", ":0", "--config", &config], b"");
        assert_eq!(ended.code(), Some(2), "{}", ended.stderr);
        for words in says.iter().chain(&["wrong.toml"]) {
            assert!(ended.stderr.contains(words), "{words} in {}", ended.stderr);
        }
    }
    let ended = Program::run(["listen", ":0", "--config", &nowhere], b"");
    assert_eq!(ended.code(), Some(2));
    assert!(ended.stderr.contains("nowhere.toml"), "{}", ended.stderr);
}

#[test]
fn a_file_for_one_command_may_say_what_others_do_not_know() {
    let folder = Folder::new();
    let config = folder.file("buffstreams.toml", b"count = 1\nretry-for = '1m'\nwindow = '1MiB'\n");
    let (listen, _) = listen(&config, &[]);
    listen.signal(Signal::TERM);
    assert_eq!(listen.end().code(), Some(0));
}
