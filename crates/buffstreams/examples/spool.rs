//! How many messages a second reach the disk, by how many are sent at the same time; beside a file that is appended to and
//! synced for as many messages at once.
//!
//! The messages go to a listener in the same process, which acknowledges them, so the spool is emptied meanwhile.
//!
//! ```console
//! $ cargo run --release -p buffstreams --features spool --example spool -- [DIRECTORY]
//! ```

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use buffstreams::{Bytes, Connection, Listener, Spool};
use futures_util::{StreamExt, TryStreamExt, stream};

const MESSAGE: usize = 110;
const ROUND: Duration = Duration::from_millis(300);
const ROUNDS: usize = 5;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = match &given {
        Some(directory) => tempfile::tempdir_in(directory)?,
        None => tempfile::tempdir_in(".")?,
    };
    let server = Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
    println!("{MESSAGE} bytes each, on disk and synced; median (least to most) of {ROUNDS} rounds");
    println!("{:>9} {:>32} {:>32} {:>7}", "at once", "messages a second", "a plain file", "ratio");
    for at_once in [1, 16, 256, 4_096, 65_536] {
        let (mut ours, mut plain) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            plain.push(append(&folder.path().join(format!("file {at_once} {round}")), at_once)?);
            let spool = Spool::open(folder.path().join(format!("spool {at_once} {round}")))?;
            let connection = Connection::builder().memory(64 << 20).dial_spooled(server.local_address(), spool)?;
            let message = Bytes::from(vec![b'x'; MESSAGE]);
            let begun = Instant::now();
            stream::iter(std::iter::repeat(message).take_while(|_| begun.elapsed() < ROUND))
                .map(|message| connection.send_bytes(message))
                .buffered(at_once)
                .try_for_each(|_| async { Ok(()) })
                .await?;
            let took = begun.elapsed();
            ours.push(connection.stats().accepted as f64 / took.as_secs_f64());
            let stats = connection.close(Duration::from_secs(60)).await?;
            assert_eq!(stats.settled, stats.accepted, "every message arrived");
        }
        let ratio = median(&mut ours) / median(&mut plain);
        println!("{at_once:>9} {:>32} {:>32} {ratio:>7.2}", spread(&ours), spread(&plain));
    }
    server.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

/// What a disk can do: one write and one sync for so many messages.
fn append(path: &Path, at_once: usize) -> std::io::Result<f64> {
    let mut file = File::create(path)?;
    let block = vec![b'x'; at_once * (MESSAGE + 1)];
    let (begun, mut messages) = (Instant::now(), 0);
    while begun.elapsed() < ROUND {
        file.write_all(&block)?;
        file.sync_data()?;
        messages += at_once;
    }
    Ok(messages as f64 / begun.elapsed().as_secs_f64())
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Sorted rates in words.
fn spread(rates: &[f64]) -> String {
    format!("{:.0} ({:.0} to {:.0})", rates[rates.len() / 2], rates[0], rates[rates.len() - 1])
}
