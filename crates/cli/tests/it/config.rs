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
        (b"count = -1", &["-1", "`count` above all tables: "]),
        (b"[listen]\noutput = 'yaml'", &["yaml", "`output` in [listen]: "]),
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

#[test]
fn what_stands_above_all_tables_is_left_out_where_it_says_nothing_alone() {
    let folder = Folder::new();
    let config = folder.file(
        "buffstreams.toml",
        b"max-message-size = '64KiB'\nwindow = '1MiB'\nspool-size = '1MiB'\ntls-name = 'a'\n[bench]\ntls = true\n[send]\n\
          retry-for = 0\n",
    );
    let (listen, address) = listen(&config, &["--count", "1"]);
    let tap = Program::start(["tap", "127.0.0.1:0", &address, "--config", &config]);
    let sent = Program::run(["send", &tap.address(), "--config", &config], b"hello\n");
    assert_eq!(sent.last_line(), "accepted 1, settled 1, failed 0", "{}", sent.stderr);
    assert_eq!(listen.end().stdout, b"hello\n");

    let general = folder.file("tls.toml", b"tls-cert = 'own.pem'\ntls-key = 'own.key'\n[send]\nretry-for = 0\n");
    let (listen, address) = Program::listen(&["--count", "1"]);
    let sent = Program::run(["send", &address, "--config", &general], b"hello\n");
    assert_eq!(sent.last_line(), "accepted 1, settled 1, failed 0", "{}", sent.stderr);
    assert_eq!(listen.end().stdout, b"hello\n");
    let used = Program::run(["listen", ":0", "--config", &general], b"");
    assert!(used.stderr.contains("own.pem"), "listen can use it: {}", used.stderr);
}

#[test]
fn what_does_not_fit_together_is_told_with_its_place_in_the_file() {
    let folder = Folder::new();
    let cases: [(&[&str], &str, &str); 11] = [
        (&["listen", ":0"], "[listen]\ntls-cert = 'a.pem'", "`tls-cert` in [listen]: listen needs --tls-key <FILE>"),
        (&["listen", ":0"], "tls-cert = 'a.pem'", "`tls-cert` above all tables: listen needs --tls-key <FILE>"),
        (
            &["listen", ":0"],
            "tls-ca = 'a.pem'",
            "`tls-ca` above all tables: listen needs --tls-key <FILE>, --tls-cert <FILE>",
        ),
        (
            &["tap", ":0", ":1"],
            "[tap]\nmax-message-size = 9",
            "`max-message-size` in [tap]: tap needs --framing <NAME>",
        ),
        (&["send", ":1"], "[send]\nwindow = '1MiB'", "`window` in [send]: --window is for acknowledgements"),
        (&["send", ":1"], "[send]\ntls-name = 'a'", "`tls-name` in [send]: --tls-name and --tls-cert are for TLS"),
        (&["send", ":1"], "spool = 'outgoing'", "`spool` above all tables: --spool keeps messages until"),
        (
            &["send", ":1"],
            "framing = 'u8'\n[send]\ndelivery = 'acked'\nwindow = 9",
            "`framing` above all tables, `delivery` in [send]: --framing u8 leaves no way",
        ),
        (&["send", ":1", "--framing", "u8"], "[send]\ndelivery = 'acked'", "`delivery` in [send]: --framing u8"),
        (&["export", "x.rec"], "output = 'json'", "`output` above all tables: json needs a message type"),
        (&["export", "x.rec", "--output", "lines"], "proto = ['no.proto']\ntype = 'A'", "no.proto"),
    ];
    for (typed, content, says) in cases {
        let config = folder.file("wrong.toml", content.as_bytes());
        let ended = Program::run(typed.iter().chain(&["--config", &config]), b"");
        assert_eq!(ended.code(), Some(2), "{content}: {}", ended.stderr);
        let named = ended.stderr.starts_with(&format!("error: {config}: "));
        assert!(named && ended.stderr.contains(says), "{content}: {}", ended.stderr);
    }
    let config = folder.file("right.toml", b"[send]\ndelivery = 'acked'\n");
    let ended = Program::run(["send", ":1", "--config", &config, "--framing", "u32", "--window", "1MiB"], b"");
    assert!(ended.stderr.starts_with("error: invalid value 'u32'"), "it was typed: {}", ended.stderr);
}
