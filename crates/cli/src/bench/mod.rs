//! `buffstreams bench`: puts load on a listener and measures what comes back.
//!
//! All connections are open, and each has had one message answered, before the clock starts (`load`). Then messages are due
//! at a given rate whatever becomes of them (`pace`), answers are heard (`answers`) and counted (`account`), and told as a table
//! or as JSON (`table`) and as a picture (`picture`). Nothing is left out quietly: what was not sent, not answered or not
//! answered right is counted, and what percentiles leave out is said beside them.

mod account;
mod answers;
mod arguments;
mod load;
mod measured;
mod message;
mod pace;
mod picture;
mod table;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use buffstreams::{Connection, ErrorKind, Framing, Retry, State, TlsClient, per_connection};
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::report::{Report, counted};
use crate::signals::Signals;
use crate::{Outcome, Status, output};

use answers::{Echoes, HELLO, Hearing};
pub(crate) use arguments::BenchArguments;
use arguments::By;
use load::measure;
use message::Content;

/// Connections that are opened at a time.
const OPENED_TOGETHER: usize = 64;

/// Messages in hand of one of a few connections, and of one of many, in bytes.
const MEMORY: usize = 4 << 20;
const MEMORY_OF_MANY: usize = 256 << 10;
const MANY: usize = 8;

/// How long a good end may take.
const LAST_WORK: Duration = Duration::from_secs(1);

pub(crate) async fn run(arguments: BenchArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.framing()?;
    let tls = arguments.tls.client()?;
    let mut signals = Signals::watch_with(report, tls.as_ref(), TlsClient::reload)?;
    let hearing = Hearing::new(Content::new(arguments.size), arguments.connections, arguments.by == By::Echo);
    let connections = tokio::select! {
        opened = open(&arguments, framing, tls, &hearing) => opened?,
        () = signals.first() => return Err("interrupted before the load had begun".into()),
    };
    // Before anything is measured that would have no place then.
    let [mut html, mut svg] = [create(arguments.html.as_deref())?, create(arguments.svg.as_deref())?];
    let measured = measure(&arguments, &connections, &hearing, &mut signals, report).await;
    let closed = connections.iter().filter(|connection| connection.state() == State::Closed).count();
    let last_work = if measured.lost() == 0 { LAST_WORK } else { Duration::ZERO };
    join_all(connections.iter().map(|connection| connection.close(last_work))).await;
    report.finish();
    report.say_left_out();

    let told = if arguments.json { table::json(&measured) } else { table::text(&measured) };
    output::put(told.as_bytes())?;
    let picture = (html.is_some() || svg.is_some()).then(|| picture::svg(&measured)).transpose()?;
    if let (Some(html), Some(picture)) = (&mut html, &picture) {
        html.write(&picture::html(&measured, picture))?;
    }
    if let (Some(svg), Some(picture)) = (&mut svg, &picture) {
        svg.write(picture)?;
    }
    if closed > 0 {
        let lost = if closed == 1 { "was lost" } else { "were lost" };
        report.fail(format_args!(
            "{closed} of {} {lost} on the way",
            counted(connections.len() as u64, "connection", "connections")
        ));
    }
    let is_whole = measured.lost() == 0 && measured.wrong == 0 && closed == 0;
    if !is_whole {
        let lost = counted(measured.lost(), "message was not answered", "messages were not answered");
        report.fail(format_args!("{lost}, {} wrongly", measured.wrong));
    }
    Ok(if is_whole { Status::Success } else { Status::Failure })
}

/// A file for a picture.
struct Canvas {
    name: String,
    file: File,
}

impl Canvas {
    fn write(&mut self, content: &str) -> io::Result<()> {
        self.file.write_all(content.as_bytes()).map_err(|error| named(&self.name, &error))
    }
}

fn create(path: Option<&Path>) -> io::Result<Option<Canvas>> {
    let Some(path) = path else { return Ok(None) };
    let name = path.display().to_string();
    let file = File::create(path).map_err(|error| named(&name, &error))?;
    Ok(Some(Canvas { name, file }))
}

fn named(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

/// Opens all connections, and has the first message of each answered.
async fn open(
    arguments: &BenchArguments,
    framing: Framing,
    tls: Option<TlsClient>,
    hearing: &Arc<Hearing>,
) -> Result<Vec<Connection>, Box<dyn std::error::Error + Send + Sync>> {
    let mut builder = Connection::builder()
        .prefix(framing.prefix())
        .max_message_size(framing.max_message_size())
        .memory(if arguments.connections as usize > MANY { MEMORY_OF_MANY } else { MEMORY })
        .retry(Retry::For(arguments.wait))
        // They are counted as not answered.
        .on_failed(drop);
    if arguments.is_acked() {
        builder = builder.delivery(buffstreams::Delivery::Acked);
    }
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let dial = |number| {
        let (hearing, next) = (Arc::clone(hearing), Arc::new(AtomicU64::new(number)));
        let service = per_connection(move |_: &buffstreams::Peer| Echoes::new(&hearing, &next));
        builder.clone().handler(service).dial(arguments.address.clone())
    };
    let opened =
        stream::iter(0..arguments.connections).map(dial).buffered(OPENED_TOGETHER).try_collect::<Vec<_>>().await;
    let (echo, sessions) = match (arguments.by, arguments.is_acked()) {
        (By::Echo, false) => (" --echo", ""),
        (By::Echo, true) => (" --echo", ", without --no-sessions,"),
        (By::Acks, _) => ("", ", without --no-sessions,"),
    };
    let connections = opened.map_err(|error| match error.kind() {
        ErrorKind::Connect => format!("{error}; start `buffstreams listen{echo}`{sessions} there first"),
        _ => error.to_string(),
    })?;
    let mut hello = Vec::new();
    hearing.content.write(HELLO, &mut hello);
    for connection in &connections {
        connection.send(&hello).await?;
    }
    let answered = async {
        join_all(connections.iter().map(|connection| connection.flush())).await;
        if arguments.by == By::Echo {
            hearing.all_hellos().await;
        }
    };
    if tokio::time::timeout(arguments.wait, answered).await.is_err() {
        let wait = humantime::format_duration(arguments.wait);
        return Err(match arguments.by {
            By::Echo => format!(
                "no answer within {wait}: is it `buffstreams listen --echo`, with the same --framing and \
                 --max-message-size? To measure acknowledgements instead, add --by acks"
            ),
            By::Acks => format!("no acknowledgement within {wait}: is it `buffstreams listen`?"),
        }
        .into());
    }
    Ok(connections)
}
