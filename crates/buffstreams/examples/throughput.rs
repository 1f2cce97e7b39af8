//! One task sends 110-byte messages one by one; a raw socket moves the same bytes; both rates, and their ratio.
//!
//! Sender and receiver are processes of their own, over loopback. The two systems take turns.
//!
//! `cargo run --release -p buffstreams --example throughput [MESSAGES] [ROUNDS]`

use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use buffstreams::{Connection, Listener};

const MESSAGE: usize = 110;
const FRAME: usize = MESSAGE + 3;
const BLOCK: usize = 256 * 1024;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, messages] = arguments.as_slice() {
        match role.as_str() {
            "receive-raw" => return receive_raw(messages.parse()?),
            "receive" => return receive(messages.parse()?),
            _ => {}
        }
    }
    let messages: u64 = arguments.first().map_or(Ok(20_000_000), |text| text.parse())?;
    let rounds: usize = arguments.get(1).map_or(Ok(5), |text| text.parse())?;

    let mut ratios = Vec::new();
    for round in 0..=rounds {
        let raw = rate(messages, "receive-raw", |address| send_raw(address, messages))?;
        let ours = rate(messages, "receive", |address| send(address, messages))?;
        let ratio = ours / raw;
        let note = if round == 0 { "  (warm-up)" } else { "" };
        println!("raw {:6.2} M/s   buffstreams {:6.2} M/s   ratio {ratio:.2}{note}", raw / 1e6, ours / 1e6);
        if round > 0 {
            ratios.push(ratio);
        }
    }
    ratios.sort_by(f64::total_cmp);
    if let (Some(least), Some(most)) = (ratios.first(), ratios.last()) {
        println!("median ratio {:.2} (from {least:.2} to {most:.2})", ratios[ratios.len() / 2]);
    }
    Ok(())
}

/// Messages a second, from the first that is sent until the receiver has counted the last.
fn rate(
    messages: u64,
    role: &str,
    send: impl FnOnce(&str) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut receiver = Command::new(std::env::current_exe()?)
        .args([role, &messages.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map(Receiver)?;
    let mut lines = BufReader::new(receiver.0.stdout.take().ok_or("the receiver has no output")?).lines();
    let address = lines.next().ok_or("the receiver said nothing")??;
    let start = Instant::now();
    send(&address)?;
    let counted = lines.next().ok_or("the receiver ended early")??;
    let took = start.elapsed();
    if counted != messages.to_string() {
        return Err(format!("{messages} messages were sent, and {counted} received").into());
    }
    Ok(messages as f64 / took.as_secs_f64())
}

struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send_raw(address: &str, messages: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut stream = TcpStream::connect(address)?;
    let block = vec![7; BLOCK];
    let mut left = messages * FRAME as u64;
    while left > 0 {
        let step = left.min(BLOCK as u64);
        stream.write_all(&block[..step as usize])?;
        left -= step;
    }
    Ok(())
}

fn receive_raw(messages: u64) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    let mut block = vec![0; BLOCK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut block)? {
            0 => break,
            read => bytes += black_box(&block[..read]).len() as u64,
        }
    }
    assert_eq!(bytes, messages * FRAME as u64);
    println!("{}", bytes / FRAME as u64);
    Ok(())
}

fn send(address: &str, messages: u64) -> Result<(), Box<dyn std::error::Error>> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let connection = Connection::dial(address).await?;
        let sending = tokio::spawn(async move {
            let message = [7; MESSAGE];
            for _ in 0..messages {
                connection.send(&message).await?;
            }
            connection.close(Duration::from_secs(10)).await
        });
        let stats = sending.await??;
        assert_eq!(stats.settled, messages);
        Ok(())
    })
}

fn receive(messages: u64) -> Result<(), Box<dyn std::error::Error>> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = Listener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_address());
        let count = Arc::new(AtomicU64::new(0));
        let done = Arc::new(tokio::sync::Notify::new());
        let (counter, all) = (Arc::clone(&count), Arc::clone(&done));
        let server = listener.spawn(move |message: &[u8]| {
            assert_eq!(black_box(message).len(), MESSAGE);
            if counter.fetch_add(1, Ordering::Relaxed) + 1 == messages {
                all.notify_one();
            }
            Ok(())
        });
        done.notified().await;
        println!("{}", count.load(Ordering::Relaxed));
        server.shutdown(Duration::from_secs(1)).await;
        Ok(())
    })
}
