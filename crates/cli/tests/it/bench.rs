use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use roxmltree::Document;
use serde_json::Value;

use crate::program::{Ended, Folder, Program, Signal, text};
use crate::tls::authority;
use crate::wire;

/// Short, and of a rate that any machine keeps: 400 messages are measured, after 200 that are not.
const SHORT: [&str; 6] = ["--rate", "2k", "--duration", "200ms", "--warm-up", "100ms"];

/// Bytes of a message of 110 with its prefix.
const FRAME: usize = 113;

fn bench(address: &str, options: &[&str]) -> Ended {
    Program::run(["bench", address].iter().chain(options), b"")
}

fn json(ended: &Ended) -> Value {
    let lines: Vec<_> = ended.stdout.split_inclusive(|byte| *byte == b'\n').collect();
    assert_eq!(lines.len(), 1, "{}{}", String::from_utf8_lossy(&ended.stdout), ended.stderr);
    let object: Value = serde_json::from_slice(lines[0]).unwrap();
    let [sent, answered, lost] = ["sent", "answered", "lost"].map(|name| number(&object, name));
    assert_eq!(sent, answered + lost, "{object}");
    object
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("{name} in {object}"))
}

/// The order in which figures must stand, whatever they are.
fn check_latency(latency: &Value) {
    let figures = ["min", "p50", "p90", "p99", "p99.9", "p99.99", "max"].map(|name| latency[name].as_f64().unwrap());
    assert!(figures.is_sorted() && figures[0] > 0.0, "{latency}");
    let mean = latency["mean"].as_f64().unwrap();
    assert!(figures[0] <= mean && mean <= figures[6], "{latency}");
}

/// A peer that does with each connection what `serve` does.
fn peer(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> String {
    let (listener, address) = wire::bind();
    thread::spawn(move || accept_all(&listener, &serve));
    address
}

fn accept_all(listener: &TcpListener, serve: &(impl Fn(TcpStream) + Clone + Send + 'static)) {
    for stream in listener.incoming().map_while(Result::ok) {
        let serve = serve.clone();
        thread::spawn(move || serve(stream));
    }
}

/// Sends bytes back, each block as `change` leaves it; the second argument is how many bytes came before.
fn echo(mut stream: TcpStream, mut change: impl FnMut(&mut Vec<u8>, usize)) {
    let mut before = 0;
    loop {
        let mut block = vec![0; 64 * 1024];
        let Ok(read @ 1..) = stream.read(&mut block) else { return };
        block.truncate(read);
        change(&mut block, before);
        before += read;
        if stream.write_all(&block).is_err() {
            return;
        }
    }
}

#[test]
fn echoes_are_measured_over_one_connection_and_over_several() {
    let (listen, address) = Program::listen(&["--echo", "--output", "none"]);
    for connections in ["1", "7"] {
        let options = [&SHORT[..], &["--json", "--connections", connections, "--size", "16..300"]].concat();
        let ended = bench(&address, &options);
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        let object = json(&ended);
        assert_eq!((number(&object, "sent"), number(&object, "lost")), (600, 0));
        assert_eq!((number(&object, "unsent"), number(&object, "wrong"), number(&object, "repeated")), (0, 0, 0));
        for name in ["latency_us", "sent_late_us"] {
            assert_eq!(number(&object[name], "count"), 400, "those of the warm-up do not count: {object}");
        }
        check_latency(&object["latency_us"]);
        let parts = object["answered_in_parts"].as_array().unwrap();
        let in_parts: u64 = parts.iter().map(|part| part.as_u64().unwrap()).sum();
        assert!(in_parts <= 600, "{object}");
        let rate = in_parts as f64 / object["seconds"].as_f64().unwrap();
        assert_eq!(object["rate"].as_f64().unwrap(), rate, "{object}");
        assert_eq!(object["rate_asked"].as_f64(), Some(2000.0));
    }
    listen.signal(Signal::TERM);
    let ended = listen.end();
    assert!(ended.last_line().starts_with("received 1208 messages, "), "600 and a first for each: {}", ended.stderr);
}

#[test]
fn acknowledgements_are_measured_and_echoes_of_an_acknowledged_stream() {
    let (_plain, plain) = Program::listen(&["--output", "none"]);
    let (_echoing, echoing) = Program::listen(&["--output", "none", "--echo"]);
    let cases: [(_, &[&str]); 3] =
        [(&plain, &["--by", "acks"]), (&echoing, &["--by", "acks"]), (&echoing, &["--delivery", "acked"])];
    for (address, how) in cases {
        let ended = bench(address, &[&SHORT[..], how, &["--json", "--connections", "2"]].concat());
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        let object = json(&ended);
        assert_eq!((number(&object, "sent"), number(&object, "lost")), (600, 0), "{how:?}");
        assert_eq!(number(&object["latency_us"], "count"), 400, "{object}");
        check_latency(&object["latency_us"]);
        assert_eq!(object["delivery"], "acked");
    }
}

#[test]
fn it_speaks_tls() {
    let authority = authority();
    let (ca, chain, key) = (authority.file("ca.pem"), authority.file("server.pem"), authority.file("server.key"));
    let (_listen, address) = Program::listen(&["--echo", "--output", "none", "--tls-cert", &chain, "--tls-key", &key]);
    let ended = bench(&address, &[&SHORT[..], &["--json", "--tls-ca", &ca]].concat());
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert_eq!(number(&json(&ended), "answered"), 600);
}

/// What is due during a stall waits, and is measured from when it was due. Who would send one message after the other
/// would see one that took long.
#[test]
fn a_stall_shows_in_every_message_that_it_held_up() {
    const STALL: Duration = Duration::from_millis(300);
    let address = peer(|stream| {
        let mut has_stalled = false;
        echo(stream, |_, before| {
            // About 200 of 1,200 messages have come.
            if before > 200 * FRAME && !has_stalled {
                has_stalled = true;
                thread::sleep(STALL);
            }
        });
    });
    let ended = bench(&address, &["--rate", "2k", "--duration", "600ms", "--warm-up", "0", "--json"]);
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let object = json(&ended);
    assert_eq!(number(&object["latency_us"], "count"), 1200, "{object}");
    // 600 were due in the stall, and half of them in its first half: those alone are a quarter of all.
    let p90 = object["latency_us"]["p90"].as_f64().unwrap();
    assert!(p90 >= STALL.as_micros() as f64 / 2.0, "{object}");
}

/// Here the stall reaches the sender, because more is due in it than the way holds: most of it is sent only after the stall.
#[test]
fn what_is_sent_late_counts_from_when_it_was_due() {
    const STALL: Duration = Duration::from_millis(800);
    let address = peer(|stream| {
        let mut has_stalled = false;
        echo(stream, |_, before| {
            if before > 100 * (64 << 10) && !has_stalled {
                has_stalled = true;
                thread::sleep(STALL);
            }
        });
    });
    let load = ["--rate", "1k", "--duration", "1200ms", "--warm-up", "0"];
    let large = ["--size", "64KiB", "--max-message-size", "64KiB"];
    let ended = bench(&address, &[&load[..], &large, &["--json", "--wait", "30s"]].concat());
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let object = json(&ended);
    assert_eq!(number(&object["sent_late_us"], "count"), 1200, "{object}");
    // 50 MiB are due in the stall. The way holds some of them; a tenth of all messages, 8 MiB, is late by more than this even if
    // it holds 35.
    let p90 = |name: &str| object[name]["p90"].as_f64().unwrap();
    assert!(p90("sent_late_us") > 100_000.0, "{object}");
    for name in ["p50", "p90", "p99", "max"] {
        let [late, latency] = ["sent_late_us", "latency_us"].map(|of| object[of][name].as_f64().unwrap());
        assert!(latency >= late, "{name} in {object}");
    }
}

#[test]
fn without_a_rate_the_connections_are_kept_full_and_no_latency_is_claimed() {
    let (_listen, address) = Program::listen(&["--echo", "--output", "none"]);
    let options = ["--duration", "1s", "--warm-up", "50ms", "--connections", "2"];
    let cases: [&[&str]; 3] = [&[], &["--delivery", "acked"], &["--by", "acks"]];
    for how in cases {
        let ended = bench(&address, &[&options[..], how, &["--json"]].concat());
        assert_eq!(ended.code(), Some(0), "{how:?}: {}", ended.stderr);
        let object = json(&ended);
        // How many come within the second depends on what else the machine does.
        let parts = object["answered_in_parts"].as_array().unwrap();
        let in_time: f64 = parts.iter().map(|part| part.as_f64().unwrap()).sum();
        assert!(number(&object, "answered") > 0 && in_time <= number(&object, "answered") as f64, "{object}");
        assert_eq!(object["rate"].as_f64().unwrap(), in_time, "{object}");
        assert!(object["latency_us"].is_null() && object["rate_asked"].is_null(), "{object}");
    }
    let ended = bench(&address, &options);
    let table = String::from_utf8(ended.stdout.clone()).unwrap();
    assert!(table.contains("lost 0") && table.contains("No latency") && table.contains("--rate"), "{table}");
}

#[test]
fn the_table_has_the_percentiles_and_no_colours() {
    let (_listen, address) = Program::listen(&["--echo", "--output", "none"]);
    let ended = bench(&address, &SHORT);
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let table = String::from_utf8(ended.stdout.clone()).unwrap();
    for words in ["sent 600, answered 600, lost 0", "of 2,000 asked", "p99.99", "latency", "sent late", "was due"] {
        assert!(table.contains(words), "{words} in\n{table}");
    }
    assert!(!table.contains('\x1b') && ended.stderr.is_empty(), "{table}{}", ended.stderr);
}

#[test]
fn the_picture_and_the_page_are_well_formed_and_need_nothing_else() {
    let folder = Folder::new();
    let [html, svg] = ["bench.html", "bench.svg"].map(|name| text(&folder.path(name)));
    let (_listen, address) = Program::listen(&["--echo", "--output", "none"]);
    for (rate, charts) in [(&SHORT[..], 2), (&SHORT[2..], 1)] {
        let ended = bench(&address, &[rate, &["--html", &html, "--svg", &svg]].concat());
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        let picture = std::fs::read_to_string(&svg).unwrap();
        let parsed = Document::parse(&picture).unwrap();
        let texts: String = parsed.descendants().filter_map(|node| node.text()).collect();
        assert!(texts.contains("Answers a second"));
        assert_eq!(texts.contains("Latency by percentile") && texts.contains("99 %"), charts == 2, "{texts}");
        assert!(parsed.descendants().any(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "polyline"))));

        let page = std::fs::read_to_string(&html).unwrap();
        // But for its first line, the page is XML too.
        let page = Document::parse(page.strip_prefix("<!DOCTYPE html>").unwrap()).unwrap();
        assert!(page.descendants().any(|node| node.has_tag_name("pre") && node.text().unwrap().contains("lost 0")));
        assert!(!page.descendants().any(|node| node.attributes().any(|it| it.value().starts_with("http"))));
    }
}

#[test]
fn where_nothing_answers_it_says_what_to_do() {
    let (_listen, address) = Program::listen(&["--output", "none"]);
    let ended = bench(&address, &["--wait", "200ms"]);
    assert_eq!(ended.code(), Some(1));
    assert!(ended.last_line().contains("listen --echo") && ended.last_line().contains("--by acks"), "{}", ended.stderr);
    assert!(ended.last_line().contains("the same --framing and --max-message-size"), "{}", ended.stderr);
    assert!(ended.stdout.is_empty(), "nothing was measured");

    let nobody = format!("unix:{}", Folder::new().path("nobody").display());
    let ended = bench(&nobody, &[]);
    assert_eq!(ended.code(), Some(1));
    assert!(ended.last_line().contains("start `buffstreams listen --echo` there"), "{}", ended.stderr);

    let (_listen, without) = Program::listen(&["--no-sessions"]);
    let ended = bench(&without, &["--by", "acks"]);
    assert_eq!(ended.code(), Some(1));
    let start = "this listener takes no sessions; start `buffstreams listen`, without --no-sessions, there first";
    assert!(ended.last_line().ends_with(start), "{}", ended.stderr);
}

#[test]
fn a_picture_that_can_be_written_nowhere_ends_it_before_the_load() {
    let folder = Folder::new();
    let (listen, address) = Program::listen(&["--echo", "--output", "none"]);
    let nowhere = text(&folder.path("nowhere/bench.svg"));
    for option in ["--svg", "--html"] {
        let ended = bench(&address, &["--duration", "1h", option, &nowhere]);
        assert_eq!(ended.code(), Some(1));
        assert!(ended.last_line().starts_with(&format!("error: {nowhere}: ")), "{}", ended.stderr);
        assert!(ended.stdout.is_empty(), "nothing was measured");
    }
    listen.signal(Signal::TERM);
    assert!(listen.end().last_line().starts_with("received 2 messages"), "the first of each, and no more");
}

#[test]
fn answers_that_are_wrong_or_never_come_are_counted_and_end_with_1() {
    let garbling = peer(|stream| {
        echo(stream, |block, before| {
            // The last byte of a message, never that of the first.
            if before >= FRAME && block.len().is_multiple_of(FRAME) {
                *block.last_mut().unwrap() ^= 1;
            }
        });
    });
    let ended = bench(&garbling, &[&SHORT[..], &["--json", "--wait", "1s"]].concat());
    let object = json(&ended);
    assert_eq!(ended.code(), Some(1), "{object}");
    assert!(number(&object, "wrong") > 0 && number(&object, "lost") == number(&object, "wrong"), "{object}");

    let swallowing = peer(|stream| {
        echo(stream, |block, before| {
            if before >= 100 * FRAME {
                block.clear();
            }
        });
    });
    let ended = bench(&swallowing, &[&SHORT[..], &["--wait", "1s"]].concat());
    let table = String::from_utf8(ended.stdout.clone()).unwrap();
    assert_eq!(ended.code(), Some(1), "{table}");
    assert!(table.contains("percentiles are lower than they should be"), "{table}");
    assert!(ended.last_line().contains("messages were not answered"), "{}", ended.stderr);
}

#[test]
fn a_peer_that_goes_away_ends_it_with_what_was_measured() {
    let (listener, address) = wire::bind();
    let program = Program::start(["bench", &address, "--rate", "1k", "--duration", "1h", "--wait", "1s"]);
    let mut stream = wire::accept(&listener);
    let mut frames = vec![0; 100 * FRAME];
    for frame in frames.chunks_mut(FRAME) {
        stream.read_exact(frame).unwrap();
        stream.write_all(frame).unwrap();
    }
    drop((stream, listener));
    let ended = program.end();
    let table = String::from_utf8_lossy(&ended.stdout);
    assert_eq!(ended.code(), Some(1), "{table}");
    assert!(ended.stderr.contains("1 of 1 connection was lost"), "{}", ended.stderr);
    assert!(table.contains("messages    sent ") && !table.contains("lost 0"), "{table}");
}

#[test]
fn a_rate_that_cannot_be_kept_is_told_with_what_was_not_sent() {
    let (_listen, address) = Program::listen(&["--echo", "--output", "none"]);
    let options = ["--rate", "900M", "--duration", "100ms", "--warm-up", "0", "--wait", "1s"];
    let ended = bench(&address, &options);
    let table = String::from_utf8(ended.stdout.clone()).unwrap();
    assert_eq!(ended.code(), Some(0), "no message that was sent is lost: {table}{}", ended.stderr);
    assert!(table.contains("not sent ") && table.contains("The rate was not kept"), "{table}");
    assert!(table.contains("percentiles are lower than they should be"), "{table}");
}

#[test]
fn an_interruption_ends_it_with_what_was_measured() {
    let (told, heard) = mpsc::channel();
    let address = peer(move |stream| {
        let told = told.clone();
        echo(stream, move |_, before| {
            if before > 50 * FRAME {
                let _ = told.send(());
            }
        });
    });
    let program = Program::start(["bench", &address, "--rate", "1k", "--duration", "1h", "--warm-up", "0"]);
    heard.recv_timeout(crate::program::DEADLINE).unwrap();
    program.signal(Signal::INT);
    let ended = program.end();
    let table = String::from_utf8(ended.stdout.clone()).unwrap();
    assert_eq!(ended.status.code(), Some(0), "{table}{}", ended.stderr);
    assert!(table.contains("Interrupted") && table.contains("lost 0") && table.contains("p99"), "{table}");
}

#[test]
fn it_shows_on_a_terminal_how_it_goes() {
    let (_listen, address) = Program::listen(&["--echo", "--output", "none"]);
    let program = Program::start_on_terminal(["bench", &address, "--rate", "1k", "--duration", "1h"]);
    for words in ["(warm-up)", " msg/s"] {
        program.wait_stderr(words, |said| String::from_utf8_lossy(said).contains(words).then_some(()));
    }
    program.signal(Signal::INT);
    assert_eq!(program.end().code(), Some(0));
}

#[test]
fn a_listener_sends_every_message_back_however_late_it_is_read() {
    let options = ["--echo", "--output", "none", "--framing", "varint", "--max-message-size", "1MiB"];
    let (_listen, address) = Program::listen(&options);
    // Far more than all buffers on the way hold; of the long ones, not even two have room with the listener.
    let short = (0_u32..20_000).map(|number| number.to_be_bytes().repeat(1 + number as usize % 500)).collect();
    let long = (0_u32..40).map(|number| number.to_be_bytes().repeat((200 << 10) - number as usize)).collect();
    for messages in [short, long] as [Vec<Vec<u8>>; 2] {
        let frames = wire::delimited(messages);
        let expected = frames.clone();
        let mut reading = wire::connect(&address);
        let mut writing = reading.try_clone().unwrap();
        let writer = thread::spawn(move || {
            writing.write_all(&frames).unwrap();
            writing.shutdown(std::net::Shutdown::Write).unwrap();
        });
        // A moment for replies to back up, if they will.
        thread::sleep(Duration::from_millis(100));
        let received = wire::wait_until_closed(&mut reading);
        writer.join().unwrap();
        assert_eq!(received.len(), expected.len());
        assert!(received == expected, "every message, in order and unchanged");
    }
}

#[test]
fn a_listener_with_a_count_sends_back_what_it_has_printed_and_no_more() {
    let (listen, address) = Program::listen(&["--echo", "--count", "2", "--framing", "u8"]);
    let mut stream = wire::connect(&address);
    stream.write_all(&wire::u8_frames(["one", "two", "three"])).unwrap();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    assert_eq!(wire::wait_until_closed(&mut stream), wire::u8_frames(["one", "two"]));
    assert_eq!(listen.end().stdout, b"one\ntwo\n");
}
