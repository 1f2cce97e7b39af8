//! `--metrics` as Prometheus meets it: over plain HTTP, read by somebody else's parser.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use prometheus_parse::{Sample, Scrape, Value};

use crate::program::{DEADLINE, Folder, Program, Signal, text};
use crate::wire;

/// Waits for the line that says where the metrics are.
pub(crate) fn metrics_of(program: &Program) -> String {
    program.wait_stderr("a line that says where the metrics are", |said| {
        let said = String::from_utf8_lossy(said);
        let whole = &said[..=said.rfind('\n')?];
        whole.lines().find_map(|line| line.strip_prefix("metrics on ")).map(str::to_owned)
    })
}

/// An answer: its first line and headers, and its body.
fn get(address: &str, request: &str) -> (String, String) {
    let mut stream = wire::connect(address);
    stream.write_all(format!("{request}\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer}"));
    (head.to_owned(), body.to_owned())
}

/// The numbers of one role, by name and reason.
#[derive(Debug)]
struct Numbers(BTreeMap<String, f64>);

impl Numbers {
    fn scrape(address: &str, role: &str, name: &str) -> Numbers {
        let (head, body) = get(address, "GET /metrics HTTP/1.1");
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("text/plain; version=0.0.4"), "{head}");
        let scrape = Scrape::parse(body.lines().map(|line| Ok(line.to_owned()))).unwrap();
        let mut numbers = BTreeMap::new();
        for Sample { metric, value, labels, .. } in scrape.samples {
            assert!(scrape.docs.contains_key(&metric), "{metric} has no HELP");
            let value = match value {
                Value::Counter(value) if metric.ends_with("_total") => value,
                Value::Gauge(value) if !metric.ends_with("_total") => value,
                value => panic!("{metric} is {value:?}"),
            };
            if let Some(metric) = metric.strip_prefix("buffstreams_") {
                assert_eq!((labels.get("role"), labels.get("name")), (Some(role), Some(name)), "{metric}");
                let reason = labels.get("reason").map(|reason| format!(" {reason}")).unwrap_or_default();
                numbers.insert(format!("{metric}{reason}"), value);
            } else {
                assert!(metric.starts_with("process_"), "{metric}");
            }
        }
        assert!(body.contains("process_resident_memory_bytes "), "{body}");
        Numbers(numbers)
    }

    #[track_caller]
    fn get(&self, what: &str) -> u64 {
        *self.0.get(what).unwrap_or_else(|| panic!("{what} in {:?}", self.0)) as u64
    }

    fn failed(&self) -> u64 {
        self.0
            .iter()
            .filter(|(name, _)| name.starts_with("messages_failed_total"))
            .map(|(_, value)| *value as u64)
            .sum()
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn listen_tells_prometheus_what_came_and_what_was_refused() {
    let listener = Program::start(["listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--output", "none"]);
    let (address, metrics) = (listener.address(), metrics_of(&listener));
    let second = listener.wait_stderr("a second line", |said| {
        String::from_utf8_lossy(said)
            .split_inclusive('\n')
            .nth(1)
            .filter(|line| line.ends_with('\n'))
            .map(str::to_owned)
    });
    assert_eq!(second, format!("metrics on {metrics}\n"));
    assert_eq!(Program::run(["send", &address], b"one\ntwo\n").code(), Some(0));
    assert_eq!(Program::run(["send", &address, "--delivery", "acked"], b"three\n").code(), Some(0));
    wire::deliver(&address, &[0xff; 100]);
    let open = wire::connect(&address);
    until("all have come and gone, and one is there", || {
        let numbers = Numbers::scrape(&metrics, "listener", &address);
        numbers.get("connections_opened_total") == 4 && numbers.get("connections_open") == 1
    });
    let numbers = Numbers::scrape(&metrics, "listener", &address);
    assert_eq!(numbers.get("messages_received_total"), 3);
    assert_eq!(numbers.get("received_bytes_total"), 11);
    assert_eq!(numbers.get("connections_broken_total malformed"), 1);
    assert_eq!(numbers.get("connections_broken_total io"), 0);
    assert_eq!(numbers.get("connections_refused_total too_many"), 0);
    drop(open);
    listener.signal(Signal::TERM);
    assert_eq!(listener.end().last_line(), "received 3 messages, 11 bytes");
}

#[test]
fn send_tells_prometheus_what_became_of_every_message_at_every_scrape() {
    let folder = Folder::new();
    let input = folder.file("input", &b"a message of some length, of which there are many\n".repeat(300_000));
    let (listener, address) = Program::listen(&["--output", "none"]);
    let mut sender = Program::start(["send", &address, "-", "--delivery", "acked", "--metrics", "127.0.0.1:0"]);
    let metrics = metrics_of(&sender);
    let mut stdin = sender.take_stdin();
    let writing = std::thread::spawn(move || {
        stdin.write_all(&std::fs::read(input).unwrap()).unwrap();
        stdin
    });
    let mut scrapes = 0;
    until("all are settled", || {
        let numbers = Numbers::scrape(&metrics, "connection", &address);
        let went = numbers.get("messages_settled_total") + numbers.failed() + numbers.get("messages_in_flight");
        assert_eq!(numbers.get("messages_accepted_total"), went, "{numbers:?}");
        scrapes += 1;
        numbers.get("messages_settled_total") == 300_000
    });
    assert!(scrapes > 1, "it was over before anybody looked");
    let numbers = Numbers::scrape(&metrics, "connection", &address);
    assert_eq!((numbers.get("connections_open"), numbers.get("connections_down")), (1, 0));
    assert!(numbers.get("written_bytes_total") > 300_000 * 50);
    // The listener goes: that shows, too.
    drop(listener);
    until("it is missed", || Numbers::scrape(&metrics, "connection", &address).get("connections_down") == 1);
    let numbers = Numbers::scrape(&metrics, "connection", &address);
    assert_eq!(numbers.get("connection_losses_total"), 1);
    drop(writing.join().unwrap());
    assert_eq!(sender.end().last_line(), "accepted 300000, settled 300000, failed 0");
}

#[test]
fn a_spool_shows_how_much_waits_in_it() {
    let folder = Folder::new();
    let spool = text(&folder.path("spool"));
    let nobody = format!("unix:{}", folder.path("nobody").display());
    let options = ["--delivery", "acked", "--spool", &spool, "--retry-for", "1m", "--metrics", "127.0.0.1:0"];
    let mut sender = Program::start(["send", &nobody].iter().chain(&options));
    sender.write(b"one\ntwo\n");
    let metrics = metrics_of(&sender);
    until("both wait", || Numbers::scrape(&metrics, "connection", &nobody).get("messages_in_flight") == 2);
    let numbers = Numbers::scrape(&metrics, "connection", &nobody);
    assert!(numbers.get("spool_bytes") > 6);
    assert_eq!(numbers.get("spool_capacity_bytes"), 1 << 30);
    assert!(numbers.get("connect_failures_total") > 0);
}

#[test]
fn what_is_no_question_for_metrics_is_answered_so_and_delays_nobody() {
    let listener = Program::start(["listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
    let metrics = metrics_of(&listener);
    let silent: Vec<TcpStream> = (0..32).map(|_| wire::connect(&metrics)).collect();
    assert!(get(&metrics, "GET / HTTP/1.1").0.starts_with("HTTP/1.1 404 "));
    assert!(get(&metrics, "POST /metrics HTTP/1.1").0.starts_with("HTTP/1.1 405 "));
    assert!(get(&metrics, "rubbish").0.starts_with("HTTP/1.1 400 "));
    let (head, body) = get(&metrics, "GET /metrics HTTP/1.1");
    assert!(head.starts_with("HTTP/1.1 200 ") && body.contains("buffstreams_connections_open{"), "{head}");
    drop(silent);
}

#[test]
fn an_address_that_is_taken_ends_with_1_and_is_named() {
    let (_taken, address) = wire::bind();
    for arguments in [["listen", "127.0.0.1:0"], ["send", "127.0.0.1:1"]] {
        let ended = Program::run(arguments.iter().copied().chain(["--metrics", &address]), b"");
        assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
        assert!(ended.last_line().starts_with(&format!("error: --metrics {address}: ")), "{}", ended.stderr);
    }
}

#[test]
fn who_asks_and_never_reads_keeps_nobody_out() {
    let (listen, _) = Program::listen(&["--output", "none", "--metrics", "127.0.0.1:0"]);
    let address = metrics_of(&listen);
    let strangers: Vec<_> = (0..64)
        .map(|_| {
            let mut stranger = wire::connect(&address);
            // It may have been closed behind the first answer.
            let _ = stranger.write_all(&b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n".repeat(1_000));
            stranger
        })
        .collect();
    let (head, body) = get(&address, "GET /metrics HTTP/1.1");
    assert!(head.starts_with("HTTP/1.1 200") && body.contains("buffstreams_connections_open{"), "{head}");
    drop(strangers);
}
