//! How many instructions a message costs, counted by valgrind: a figure that does not depend on the clock.
//!
//! Each case runs twice in a process of its own, the second time with twice as many messages; what the second run takes
//! more, divided by the messages it has more, is the cost of one. The figures that are expected stand in
//! `instructions.txt` beside this file, with the compiler they hold for; one that is over by more than 3 % makes this
//! program fail, unless the compiler is another.
//!
//! `cargo run --release -p buffstreams --example instructions [-- --update]`; needs valgrind.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use buffstreams::{Connection, Framing, Listener, Prefix};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MESSAGE: usize = 110;
const MESSAGES: u64 = 100_000;

/// A figure may be over the expected one by this part of it.
const TOLERANCE: f64 = 0.03;

type Case = (&'static str, fn(u64) -> Result<()>);

const CASES: [Case; 5] = [
    ("encode", |messages| encode(Prefix::Buffstreams, messages)),
    ("encode-varint", |messages| encode(Prefix::Varint, messages)),
    ("decode", |messages| decode(Prefix::Buffstreams, messages)),
    ("decode-varint", |messages| decode(Prefix::Varint, messages)),
    ("send-to-handler", send_to_handler),
];

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [case, messages] => {
            let (_, run) = CASES.iter().find(|(name, _)| name == case).ok_or("there is no such case")?;
            run(messages.parse()?)?;
            Ok(ExitCode::SUCCESS)
        }
        ["--update"] => check(true),
        [] => check(false),
        _ => Err("it takes nothing, or --update".into()),
    }
}

/// Counts every case, and compares with what is expected.
fn check(update: bool) -> Result<ExitCode> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/instructions.txt");
    let text = if update { String::new() } else { std::fs::read_to_string(&file)? };
    let (known_compiler, expected) = text.split_once('\n').unwrap_or_default();
    let expected = figures(expected)?;
    let compiler = compiler()?;
    let mut measured = format!("{compiler}\n");
    let mut is_wrong = false;
    println!("{:18} {:>9} {:>9}   instructions for each message of {MESSAGE} bytes", "case", "measured", "expected");
    for (case, _) in CASES {
        let cost = (count(case, 2 * MESSAGES)? - count(case, MESSAGES)?) as f64 / MESSAGES as f64;
        measured += &format!("{case} {cost:.1}\n");
        let verdict = match expected.get(case) {
            Some(&before) if cost > before * (1.0 + TOLERANCE) => {
                is_wrong = true;
                format!("{before:9.1}   too many")
            }
            Some(&before) if cost < before * (1.0 - TOLERANCE) => format!("{before:9.1}   fewer: --update"),
            Some(&before) => format!("{before:9.1}"),
            None => {
                is_wrong = true;
                "        -   not known: --update".to_owned()
            }
        };
        println!("{case:18} {cost:9.1} {verdict}");
    }
    if update {
        std::fs::write(&file, measured)?;
        return Ok(ExitCode::SUCCESS);
    }
    if compiler != known_compiler {
        println!("what is expected holds for {known_compiler}, and this is {compiler}: no verdict");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(if is_wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn figures(text: &str) -> Result<BTreeMap<String, f64>> {
    let lines = text.lines().map(|line| {
        let (case, cost) = line.split_once(' ').ok_or_else(|| format!("not a case and a figure: {line}"))?;
        Ok((case.to_owned(), cost.parse()?))
    });
    lines.collect()
}

/// The compiler of this machine, without its date.
fn compiler() -> Result<String> {
    let output = Command::new("rustc").arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

/// The instructions of one run.
fn count(case: &str, messages: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        // Valgrind counts each byte of a `rep movsb` as an instruction.
        .env("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=1000000000")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args([case, &messages.to_string()])
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}; it is a package of most systems"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let counted = text.lines().find_map(|line| line.split_once("Collected : "));
    match counted {
        Some((_, counted)) if output.status.success() => Ok(counted.trim().parse()?),
        _ => Err(format!("valgrind failed on {case}:\n{text}").into()),
    }
}

fn encode(prefix: Prefix, messages: u64) -> Result<()> {
    let framing = Framing::new(prefix);
    let message = [7; MESSAGE];
    let mut frames = Vec::with_capacity(64 * 1024);
    for _ in 0..messages {
        if frames.len() > 60 * 1024 {
            frames.clear();
        }
        framing.encode(black_box(&message), &mut frames)?;
    }
    black_box(frames);
    Ok(())
}

fn decode(prefix: Prefix, messages: u64) -> Result<()> {
    const BATCH: u64 = 500;
    let framing = Framing::new(prefix);
    let mut frames = Vec::new();
    for _ in 0..BATCH {
        framing.encode(&[7; MESSAGE], &mut frames)?;
    }
    for _ in 0..messages / BATCH {
        let mut rest = black_box(frames.as_slice());
        while let Some((message, taken)) = framing.decode(rest)? {
            black_box(message);
            rest = &rest[taken..];
        }
    }
    Ok(())
}

/// All that the library does for a message: `send`, Outbox, writer, a pipe in memory, reader, Inbox, handler.
fn send_to_handler(messages: u64) -> Result<()> {
    // Time stands still, so no turn is cut short by a slow machine.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    runtime.block_on(async {
        let seen = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&seen);
        let (near, far) = tokio::io::duplex(256 * 1024);
        let count = move |message: &[u8]| {
            black_box(message);
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let serving = tokio::spawn(async move { Listener::builder().serve_io(far, count).await });
        // Little memory, so that it is filled and emptied many times over.
        let connection = Connection::builder().memory(512 * 1024).from_io(near)?;
        let message = [7; MESSAGE];
        for _ in 0..messages {
            connection.send(black_box(&message)).await?;
        }
        connection.close(std::time::Duration::from_secs(10)).await?;
        serving.await??;
        if seen.load(Ordering::Relaxed) != messages {
            return Err("messages are missing".into());
        }
        Ok(())
    })
}
