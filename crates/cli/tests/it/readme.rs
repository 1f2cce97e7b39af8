//! The walk through the README, by the very lines that stand there.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::program::{DEADLINE, Folder};

const README: &str = include_str!("../../../../README.md");
const HEADING: &str = "## From nothing to a live stream, over TLS\n";

/// The commands of a section, block by block, without the prompt; what is indented under a command belongs to it.
fn blocks(section: &str) -> Vec<Vec<String>> {
    let blocks = section.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let commands =
        |block: &str| block.split("$ ").filter(|it| !it.is_empty()).map(|it| it.trim_end().to_owned()).collect();
    blocks.map(|block| commands(&format!("\n{block}").replace("\n$ ", "$ "))).collect()
}

/// A shell, with the program on its path, that dies with all that it started.
struct Shell(Child);

impl Shell {
    fn start(folder: &Folder, command: &str, output: &str) -> Shell {
        let program = Path::new(env!("CARGO_BIN_EXE_buffstreams")).parent().unwrap().display().to_string();
        let path = format!("{program}:{}", std::env::var("PATH").unwrap());
        let file = std::fs::File::create(folder.path(output)).unwrap();
        let mut shell = Command::new("bash");
        shell
            .args(["-c", command])
            .env("PATH", path)
            .env("HOME", folder.path("."))
            .current_dir(folder.path("."))
            .process_group(0);
        shell.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Shell(shell.spawn().unwrap())
    }

    /// Waits for its end, which is a good one. The folder is also the home of its user.
    fn run(folder: &Folder, command: &str) -> String {
        let status = Shell::start(folder, command, "output").0.wait().unwrap();
        let said = said(folder, "output");
        assert!(status.success(), "{command}: {said}");
        said
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

fn said(folder: &Folder, output: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(folder.path(output)).unwrap()).into_owned()
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_walk_through_the_readme_leads_to_a_live_stream_over_tls_with_metrics() {
    for tool in ["openssl", "curl", "bash"] {
        if Command::new(tool).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            println!("skipped: there is no {tool} on this machine");
            return;
        }
    }
    let section = README.split(HEADING).nth(1).unwrap().split("\n## ").next().unwrap();
    let mut blocks = blocks(section).into_iter();
    let (mut receiver, sender, watcher) = (blocks.next().unwrap(), blocks.next().unwrap(), blocks.next().unwrap());
    assert_eq!((receiver.len(), sender.len(), watcher.len(), blocks.next()), (4, 1, 2, None));

    let folder = Folder::new();
    let listen = receiver.pop().unwrap();
    assert_eq!(receiver.remove(0), "cargo install --path crates/cli");
    for command in &receiver {
        Shell::run(&folder, command);
    }
    // Whatever ports are free.
    let _listen =
        Shell::start(&folder, &listen.replace("localhost:5031", "localhost:0").replace(":9100", ":0"), "listen");
    let port = |of: &str| {
        wait(of, || {
            let said = said(&folder, "listen");
            let line = said.lines().find_map(|line| line.strip_prefix(of)).filter(|_| said.ends_with('\n'))?;
            Some(line.rsplit(':').next().unwrap().to_owned())
        })
    };
    let (messages, metrics) = (port("listening on "), port("metrics on "));
    let _send = Shell::start(&folder, &sender[0].replace("localhost:5031", &format!("localhost:{messages}")), "send");
    wait("messages", || said(&folder, "listen").contains(r#"{"sensor":"roof","celsius":"#).then_some(()));
    let [curl, top] = &watcher[..] else { unreachable!("they were counted") };
    wait("a count", || {
        let counted = Shell::run(&folder, &curl.replace("localhost:9100", &format!("localhost:{metrics}")));
        let count = counted.lines().find(|line| !line.starts_with('#'))?.rsplit(' ').next()?.parse::<f64>().ok()?;
        (count >= 2.0).then_some(())
    });
    // Without a terminal it prints what it sees once.
    let seen = Shell::run(&folder, &top.replace("localhost:9100", &format!("localhost:{metrics}")));
    assert!(seen.contains("received"), "{seen}");
}

#[test]
fn completions_and_manual_can_be_put_where_the_readme_says_by_somebody_who_has_nothing_there() {
    let section = README.split("### Options in a file, completions, manual\n").nth(1).unwrap();
    let commands = blocks(section.split("\n### ").next().unwrap()).concat();
    let [listen, make, completions, manual, read] = &commands[..] else { panic!("{commands:?}") };
    assert!(listen.starts_with("buffstreams listen ") && read.starts_with("man -M "));
    let folder = Folder::new();
    for command in [make, completions, manual] {
        Shell::run(&folder, command);
    }
    assert!(folder.path(".local/share/bash-completion/completions/buffstreams").is_file());
    let pages = read.split_whitespace().nth(2).unwrap().replace("~/", "");
    assert!(folder.path(&pages).join("man1/buffstreams-listen.1").is_file());
}
