//! The load itself, on connections that are open: sends, waits for the last answers, and adds up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use buffstreams::{Connection, State};
use futures_util::future::join_all;
use hdrhistogram::Histogram;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::account::{Account, Window};
use super::answers::{Hearing, Load, acknowledged, count_acknowledged};
use super::arguments::{BenchArguments, By};
use super::measured::Measured;
use super::pace::{Lane, Paced, Schedule, pace};
use crate::progress::{self, Totals};
use crate::report::Report;
use crate::signals::Signals;

/// How often the last answers are looked for.
const GLANCE: Duration = Duration::from_millis(5);

/// Puts the load on the connections, of which each has had its first message answered.
pub(super) async fn measure(
    arguments: &BenchArguments,
    connections: &[Connection],
    hearing: &Arc<Hearing>,
    signals: &mut Signals,
    report: &Report,
) -> Measured {
    let start = Instant::now();
    let window = Window { start, from: arguments.warm_up, to: arguments.whole_time() };
    let schedule = arguments.rate.map(|rate| Schedule::new(start, rate, arguments.whole_time()));
    let load = Load { account: Account::new(window), schedule, warm_up: arguments.warm_up };
    let load = hearing.load.get_or_init(|| load);
    let is_ending = Arc::new(AtomicBool::new(false));
    watch(hearing, window, &is_ending, report);

    let mut listening = Vec::new();
    let sent = match schedule {
        Some(schedule) => {
            let lanes = connections.iter().map(|connection| {
                let receipts = (arguments.by == By::Acks).then(|| {
                    let (receipts, received) = mpsc::unbounded_channel();
                    listening.push(tokio::spawn(acknowledged(connection.clone(), received, Arc::clone(hearing))));
                    receipts
                });
                Lane { connection: connection.clone(), receipts }
            });
            let until = arguments.whole_time() + arguments.wait;
            send_at_times(lanes.collect(), schedule, (arguments.warm_up, until), hearing, signals).await
        }
        None => {
            if arguments.by == By::Acks {
                let counting = count_acknowledged(connections.to_vec(), window.part(), Arc::clone(hearing));
                listening.push(tokio::spawn(counting));
            }
            send_always(connections, arguments.whole_time(), hearing, signals).await
        }
    };
    is_ending.store(true, Ordering::Relaxed);
    let ended = start.elapsed();
    let account = || Counted::of(connections, arguments.by, load);
    tokio::select! {
        () = wait_for_answers(connections, arguments.wait, account) => {}
        () = signals.first(), if !sent.interrupted => {}
    }
    // Those that hear of acknowledgements end with the last; where some never come, they are not waited for.
    let deadline = tokio::time::Instant::now() + GLANCE.max(window.part() * 2);
    for task in &mut listening {
        let _ = tokio::time::timeout_at(deadline, task).await;
    }
    listening.iter().for_each(JoinHandle::abort);

    let Counted { sent: sent_count, answered, .. } = account();
    let answers = load.account.answers().clone();
    let mut parts = answers.parts;
    let mut time = window.length();
    if sent.interrupted {
        let measured = ended.saturating_sub(window.from);
        parts.truncate((measured.as_nanos() / window.part().as_nanos()) as usize);
        time = window.part() * parts.len() as u32;
    }
    Measured {
        address: arguments.address.to_string(),
        connections: arguments.connections,
        sizes: arguments.size,
        is_acked: arguments.is_acked(),
        by: arguments.by,
        asked: arguments.rate,
        warm_up: arguments.warm_up,
        time,
        interrupted: sent.interrupted,
        sent: sent_count,
        answered,
        unsent: sent.unsent,
        wrong: answers.wrong,
        repeated: answers.repeated,
        parts,
        part: window.part(),
        latency: schedule.map(|_| answers.latency),
        late: sent.late,
    }
}

/// How the sending ended.
#[derive(Debug)]
struct Sent {
    unsent: u64,
    late: Option<Histogram<u64>>,
    interrupted: bool,
}

/// Sends by the schedule, from a thread of its own.
async fn send_at_times(
    lanes: Vec<Lane>,
    schedule: Schedule,
    times: (Duration, Duration),
    hearing: &Arc<Hearing>,
    signals: &mut Signals,
) -> Sent {
    let stop = Arc::new(AtomicBool::new(false));
    let (paced, mut told) = oneshot::channel();
    let pacing = thread::spawn({
        let (hearing, stop) = (Arc::clone(hearing), Arc::clone(&stop));
        move || {
            let _ = paced.send(pace(lanes, schedule, &hearing.content, times, &stop));
        }
    });
    let mut interrupted = false;
    let paced = tokio::select! {
        paced = &mut told => paced,
        () = signals.first() => {
            interrupted = true;
            stop.store(true, Ordering::Relaxed);
            pacing.thread().unpark();
            told.await
        }
    };
    let Paced { unsent, late } = paced.expect("the thread says how it went");
    Sent { unsent, late: Some(late), interrupted }
}

/// Keeps all connections full for this long.
async fn send_always(
    connections: &[Connection],
    time: Duration,
    hearing: &Arc<Hearing>,
    signals: &mut Signals,
) -> Sent {
    let senders = (0..).zip(connections).map(|(first, connection)| {
        let (connection, hearing) = (connection.clone(), Arc::clone(hearing));
        tokio::spawn(async move {
            let mut message = Vec::new();
            for number in (first..).step_by(hearing.connections as usize) {
                hearing.content.write(number, &mut message);
                if connection.send(&message).await.is_err() {
                    return;
                }
            }
        })
    });
    let mut senders: Vec<JoinHandle<()>> = senders.collect();
    let interrupted = tokio::select! {
        () = tokio::time::sleep(time) => false,
        // All connections are lost.
        _ = join_all(&mut senders) => false,
        () = signals.first() => true,
    };
    senders.iter().for_each(JoinHandle::abort);
    join_all(senders).await;
    Sent { unsent: 0, late: None, interrupted }
}

/// What was sent and answered so far, the first messages left out.
#[derive(Clone, Copy, Debug)]
struct Counted {
    sent: u64,
    answered: u64,
    /// What can still be answered.
    open: u64,
}

impl Counted {
    fn of(connections: &[Connection], by: By, load: &Load) -> Counted {
        let hellos = connections.len() as u64;
        let (mut sent, mut settled, mut in_flight) = (0, 0, 0);
        for connection in connections {
            let stats = connection.stats();
            sent += stats.accepted;
            settled += stats.settled;
            in_flight += stats.in_flight;
        }
        let sent = sent - hellos;
        match by {
            By::Acks => Counted { sent, answered: settled - hellos, open: in_flight },
            By::Echo => {
                let answered = load.account.answers().answered;
                Counted { sent, answered, open: sent.saturating_sub(answered) }
            }
        }
    }
}

/// Returns when everything is answered, when nothing can be any more, or when no answer has come for so long.
async fn wait_for_answers(connections: &[Connection], wait: Duration, count: impl Fn() -> Counted) {
    let mut answered = None;
    let mut since = Instant::now();
    loop {
        let counted = count();
        let is_over = connections.iter().all(|connection| connection.state() == State::Closed);
        if counted.open == 0 || is_over {
            return;
        }
        if answered.replace(counted.answered) != Some(counted.answered) {
            since = Instant::now();
        } else if since.elapsed() >= wait {
            return;
        }
        tokio::time::sleep(GLANCE).await;
    }
}

/// Shows how it goes, where somebody can see it.
fn watch(hearing: &Arc<Hearing>, window: Window, is_ending: &Arc<AtomicBool>, report: &Report) {
    let (hearing, is_ending) = (Arc::clone(hearing), Arc::clone(is_ending));
    let totals = move |_| {
        hearing.load.get().map_or_else(Totals::default, |load| {
            let answers = load.account.answers();
            Totals { messages: answers.answered, bytes: answers.bytes }
        })
    };
    let state = move || {
        if is_ending.load(Ordering::Relaxed) {
            "  (waiting for the last answers)"
        } else if window.start.elapsed() < window.from {
            "  (warm-up)"
        } else {
            ""
        }
    };
    report.share_with(progress::line(None, totals, state));
}
