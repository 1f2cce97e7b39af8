//! The invariants of ARCHITECTURE.md that can be read off the sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors of the house, from the ground up. A file may use what is on its own floor or below.
const FLOORS: &[&[&str]] = &[
    &["proto"],
    &["error", "log", "memory", "pace", "retry", "stats", "without_pace"],
    &["transport", "events", "shared_outbox"],
    &["metrics", "sender", "without_metrics"],
    &["door", "failed", "handler"],
    &["session"],
    &["reader", "writer"],
    &["socket"],
    &["handshake"],
    &["house"],
    &["listener", "route"],
    &["dialer", "host"],
    &["async_handler", "blocking_handler", "stream", "sink"],
    &["connection"],
    &["manager", "spool", "spread"],
    &["blocking", "typed", "codec"],
];

#[test]
fn the_core_names_no_runtime_no_socket_and_no_clock() {
    for (path, code) in sources() {
        if !path.starts_with("proto") {
            continue;
        }
        for word in ["tokio", "std::net", "socket2", "Instant::now()", "SystemTime", "crate::", "std::thread"] {
            assert!(!code.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn only_the_transport_names_kinds_of_sockets() {
    for (path, code) in sources() {
        if path.starts_with("transport") {
            continue;
        }
        for word in ["TcpStream", "TcpListener", "UnixStream", "UnixListener", "socket2"] {
            assert!(!code.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn only_the_transport_names_a_tls_library() {
    for (path, code) in sources() {
        for word in ["rustls", "webpki", "aws_lc"] {
            assert!(path.starts_with("transport/tls") || !code.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn only_the_writer_writes_to_a_socket() {
    for (path, code) in sources() {
        if path == Path::new("writer.rs") || path.starts_with("transport") {
            continue;
        }
        for word in ["poll_write", ".write_all(", ".write_buf("] {
            assert!(!code.contains(word), "{} calls {word}", path.display());
        }
    }
}

#[test]
fn imports_run_one_way() {
    let floor_of: BTreeMap<&str, usize> =
        FLOORS.iter().enumerate().flat_map(|(floor, rooms)| rooms.iter().map(move |room| (*room, floor))).collect();
    for (path, code) in sources() {
        let room = path.components().next().expect("a path has a component").as_os_str().to_string_lossy();
        let room = room.trim_end_matches(".rs");
        if room == "lib" {
            continue;
        }
        let floor = floor_of.get(room).unwrap_or_else(|| panic!("{room} has no floor: add it to FLOORS"));
        for used in code.match_indices("crate::").map(|(at, found)| &code[at + found.len()..]) {
            let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            let Some(below) = floor_of.get(used) else { continue };
            assert!(below <= floor, "{room} uses {used}, which is above it");
        }
    }
}

/// Every source file of the library with its code: without comments, and without the tests at its end.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the sources are there") {
            let path = entry.expect("the sources are there").path();
            if path.is_dir() {
                if !path.to_string_lossy().ends_with("_tests") {
                    folders.push(path);
                }
            } else if !path.to_string_lossy().ends_with("_tests.rs") {
                let text = fs::read_to_string(&path).expect("sources are text");
                let text = text.split("#[cfg(test)]").next().unwrap_or_default();
                let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>();
                found.push((path.strip_prefix(&root).expect("it is below").to_owned(), code.join("\n")));
            }
        }
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}
