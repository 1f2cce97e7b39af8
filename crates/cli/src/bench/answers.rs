//! Who hears the answers: echoes, taken by the handler of a connection, or acknowledgements, by whoever waits for receipts.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use buffstreams::{Connection, Handler, HandlerResult, Message, Receipt};
use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;

use super::account::{Account, Batch};
use super::message::Content;
use super::pace::Schedule;

/// The number of the first message on every connection, which is sent before the load.
pub(crate) const HELLO: u64 = u64::MAX;

/// Acknowledgements that are handed in together, at most.
const TOGETHER: usize = 1024;

/// The load, as those see it who hear answers.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) account: Account,
    /// Without one, latency is not measured: it would be that of the queue.
    pub(crate) schedule: Option<Schedule>,
    pub(crate) warm_up: Duration,
}

impl Load {
    /// From when the message was due, if that is measured.
    fn latency(&self, number: u64, at: Instant) -> Option<u64> {
        let schedule = self.schedule?;
        let due = schedule.due(number);
        let latency = at.saturating_duration_since(schedule.start + due);
        (due >= self.warm_up).then_some(latency.as_nanos() as u64)
    }
}

/// What all connections hear.
#[derive(Debug)]
pub(crate) struct Hearing {
    pub(crate) content: Content,
    pub(crate) connections: u64,
    /// Otherwise what comes back is passed over.
    hears_echoes: bool,
    /// The load, once it has begun.
    pub(crate) load: OnceLock<Load>,
    hellos: AtomicUsize,
    hello: Notify,
}

impl Hearing {
    pub(crate) fn new(content: Content, connections: u64, hears_echoes: bool) -> Arc<Hearing> {
        Arc::new(Hearing {
            content,
            connections,
            hears_echoes,
            load: OnceLock::new(),
            hellos: AtomicUsize::new(0),
            hello: Notify::new(),
        })
    }

    /// Waits until all connections have answered the first message.
    pub(crate) async fn all_hellos(&self) {
        loop {
            let heard = self.hello.notified();
            if self.hellos.load(Ordering::Acquire) as u64 >= self.connections {
                return;
            }
            heard.await;
        }
    }
}

/// Takes the echoes of a connection. They come in the order in which messages were sent.
#[derive(Debug)]
pub(crate) struct Echoes {
    hearing: Arc<Hearing>,
    /// The number that is expected next, whichever socket the connection has; numbers left out are lost.
    next: Arc<AtomicU64>,
    batch: Batch,
}

impl Echoes {
    pub(crate) fn new(hearing: &Arc<Hearing>, next: &Arc<AtomicU64>) -> Echoes {
        Echoes { hearing: Arc::clone(hearing), next: Arc::clone(next), batch: Batch::default() }
    }
}

impl Handler for Echoes {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        let Hearing { content, connections, hears_echoes, load, hellos, hello } = &*self.hearing;
        if !hears_echoes {
            return Ok(());
        }
        let next = self.next.load(Ordering::Relaxed);
        match (content.read(&message), load.get()) {
            (Some(HELLO), _) => {
                hellos.fetch_add(1, Ordering::Release);
                hello.notify_waiters();
            }
            (Some(number), Some(load)) if number % connections == next % connections => {
                if number < next {
                    self.batch.repeated += 1;
                    return Ok(());
                }
                self.next.store(number + connections, Ordering::Relaxed);
                self.batch.answered += 1;
                self.batch.bytes += message.len() as u64;
                if load.schedule.is_some() {
                    self.batch.latencies.extend(load.latency(number, Instant::now()));
                }
            }
            _ => self.batch.wrong += 1,
        }
        Ok(())
    }

    fn batch_end(&mut self) -> HandlerResult {
        if let Some(load) = self.hearing.load.get() {
            load.account.add(&mut self.batch, Instant::now());
        }
        Ok(())
    }
}

/// Hears of each message that is acknowledged, for its latency. Ends with the last receipt.
///
/// It waits for the receipt of the oldest message only, and then takes all others that are settled by then: a wake-up for an
/// acknowledgement, not for a message. All have the time at which the last of them was looked at.
pub(crate) async fn acknowledged(
    connection: Connection,
    mut receipts: UnboundedReceiver<(Receipt, u64)>,
    hearing: Arc<Hearing>,
) {
    let Some(load) = hearing.load.get() else { return };
    let mut settled = Vec::with_capacity(TOGETHER);
    let mut batch = Batch::default();
    let mut oldest = receipts.recv().await;
    while let Some((receipt, number)) = oldest {
        if connection.settled(receipt).await.is_ok() {
            settled.push(number);
        }
        oldest = loop {
            let next = match receipts.try_recv() {
                Ok(next) => next,
                Err(_) => break None,
            };
            match connection.settled(next.0).now_or_never() {
                Some(Ok(())) => settled.push(next.1),
                Some(Err(_)) => {}
                None => break Some(next),
            }
            if settled.len() >= TOGETHER {
                break None;
            }
        };
        let now = Instant::now();
        for number in settled.drain(..) {
            batch.answered += 1;
            batch.bytes += hearing.content.sizes().of(number) as u64;
            batch.latencies.extend(load.latency(number, now));
        }
        load.account.add(&mut batch, now);
        if oldest.is_none() {
            oldest = receipts.recv().await;
        }
    }
}

/// Counts what all connections together have had acknowledged, again and again: for a rate without latencies.
pub(crate) async fn count_acknowledged(connections: Vec<Connection>, every: Duration, hearing: Arc<Hearing>) {
    let Some(load) = hearing.load.get() else { return };
    let size = hearing.content.sizes().mean();
    let mut counted = connections.len() as u64;
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        let settled = connections.iter().map(|connection| connection.stats().settled).sum();
        let answered: u64 = settled - std::mem::replace(&mut counted, settled);
        let bytes = (answered as f64 * size) as u64;
        load.account.add(&mut Batch { answered, bytes, ..Batch::default() }, Instant::now());
    }
}
