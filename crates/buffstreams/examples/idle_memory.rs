//! What an idle connection costs a listener: resident memory per connection, after each has carried a message.
//!
//! The clients are plain sockets in a process of their own, so that only the listener's memory is measured.
//!
//! `cargo run --release -p buffstreams --example idle_memory [CONNECTIONS]` (needs as many file descriptors, and takes them
//! if the hard limit allows). Fails if a connection costs more than 2 KiB.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use buffstreams::Listener;

/// Bytes that an idle connection may cost.
const ALLOWED: u64 = 2048;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, address, connections] = arguments.as_slice() {
        assert_eq!(role, "connect");
        return connect(address, connections.parse()?);
    }
    let connections: u64 = arguments.first().map_or(Ok(9_000), |text| text.parse())?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let server = Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
        let address = server.local_address().to_string();
        let run = |connections: u64| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["connect", &address, &connections.to_string()]).stdin(Stdio::piped()).spawn()
        };
        let settle = async |clients: &mut Child, messages: u64, open: u64| {
            while server.stats().messages < messages || server.stats().open != open {
                if open > 0
                    && let Some(status) = clients.try_wait()?
                {
                    return Err(format!("the clients ended early, with {status}").into());
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            Ok::<(), Box<dyn std::error::Error>>(())
        };
        // A first few, so that what the process needs but once is not counted.
        let mut first = run(10)?;
        settle(&mut first, 10, 10).await?;
        drop(first.stdin.take());
        first.wait()?;
        settle(&mut first, 10, 0).await?;

        let before = resident()?;
        let mut clients = run(connections)?;
        settle(&mut clients, 10 + connections, connections).await?;
        let grown = resident()?.saturating_sub(before);
        println!("{connections} idle connections: {} KiB, {} bytes each", grown / 1024, grown / connections);
        drop(clients.stdin.take());
        clients.wait()?;
        if grown / connections > ALLOWED {
            return Err(format!("an idle connection may cost {ALLOWED} bytes").into());
        }
        Ok(())
    })
}

/// Opens connections, sends one message on each, and holds them until standard input ends.
fn connect(address: &str, connections: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut streams = Vec::new();
    for _ in 0..connections {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"\x0a\x00\x00hello")?;
        streams.push(stream);
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Resident memory of this process in bytes.
fn resident() -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}
