//! What is logged, and that each line tells of which connection it is, those of handlers too.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use buffstreams::{Backoff, Connection, Delivery, Framing, HandlerError, Listener, Prefix};
use tokio::io::AsyncWriteExt;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use crate::support::{Recorder, closed, connect, frames, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// Everything that is logged on this thread: `span{field=value …}: LEVEL message field=value …`.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn begin() -> (Log, DefaultGuard) {
        let log = Log::default();
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log.clone()));
        (log, guard)
    }

    fn find(&self, words: &str) -> Option<String> {
        self.0.lock().unwrap().iter().find(|line| line.contains(words)).cloned()
    }

    async fn line(&self, words: &str) -> String {
        until(&format!("a line with {words}"), || self.find(words).is_some()).await;
        self.find(words).unwrap()
    }
}

#[derive(Default)]
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.0 = format!("{value:?}{}", self.0),
            name => self.0 += &format!(" {name}={value:?}"),
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        values.record(span.extensions_mut().get_mut::<Fields>().unwrap());
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let spans: Vec<_> = context.event_scope(event).into_iter().flatten().collect();
        let spans: Vec<_> = spans
            .iter()
            .map(|span| format!("{}{{{}}}: ", span.name(), span.extensions().get::<Fields>().unwrap().0.trim()))
            .collect();
        let line = format!("{}{} {}", spans.concat(), event.metadata().level(), fields.0);
        self.0.lock().unwrap().push(line);
    }
}

fn quick() -> Backoff {
    Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) }
}

#[tokio::test]
async fn each_line_tells_of_which_connection_it_is() {
    let (log, _guard) = Log::begin();
    let server = Listener::builder().name("orders").bind("127.0.0.1:0").await.unwrap().spawn(|message: &[u8]| {
        tracing::info!("handled {}", String::from_utf8_lossy(message));
        Ok(())
    });
    let mut plain = connect(server.local_address()).await;
    let from = plain.local_addr().unwrap();
    plain.write_all(&frames(Framing::new(Prefix::Buffstreams), ["plainly"])).await.unwrap();
    let line = log.line("handled plainly").await;
    assert_eq!(line, format!(r#"connection{{name="orders" peer={from} id=0}}: INFO handled plainly"#));

    let acked = Connection::builder().delivery(Delivery::Acked).name("ours").backoff(quick());
    let connection = acked.dial(server.local_address()).await.unwrap();
    connection.send(b"surely").await.unwrap();
    let handled = log.line("handled surely").await;
    let stream = handled.split_once("stream=").unwrap().1.split_once('}').unwrap().0.to_owned();
    assert!(handled.starts_with(r#"connection{name="orders" peer=127.0.0.1:"#), "{handled}");
    assert!(handled.contains(&format!("id=1 stream={stream}}}: INFO")), "{handled}");

    let address = server.local_address();
    let theirs = format!(r#"connection{{name="ours" peer="{address}" stream={stream}}}: "#);
    let connected = log.line("INFO connected").await;
    assert_eq!(connected, format!("{theirs}INFO connected peer={address}"));
    connection.reopen();
    let lost = log.line("connection lost").await;
    assert!(lost.starts_with(&format!("{theirs}WARN connection lost")), "{lost}");
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn what_is_lost_retried_and_given_up_is_logged() {
    let (log, _guard) = Log::begin();
    let recorder = Recorder::default();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(recorder.clone());
    let address = server.local_address().to_string();
    let retry = buffstreams::Retry::For(Duration::from_millis(200));
    let connection = Connection::builder().backoff(quick()).retry(retry).dial(&address[..]).await.unwrap();
    log.line(&format!("INFO connected peer={address}")).await;
    in_time("it is shut down", server.shutdown(DEADLINE)).await;
    log.line("WARN connection lost: ").await;
    let retried = log.line("cannot connect to").await;
    assert!(retried.contains(&format!("WARN cannot connect to {address}")), "{retried}");
    in_time("it gives up", connection.closed()).await;
    assert!(log.find("WARN giving up the connection: its peer stayed away").is_some());
    assert!(log.find("failed").is_none(), "no message was in hand");
}

#[tokio::test]
async fn who_is_refused_or_breaks_a_rule_is_logged() {
    let (log, _guard) = Log::begin();
    let listener = Listener::builder().max_connections(1).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(|message: &[u8]| match message {
        b"bad" => Err(HandlerError::new("it is bad")),
        _ => Ok(()),
    });
    let mut first = connect(server.local_address()).await;
    let from = first.local_addr().unwrap();
    let mut second = connect(server.local_address()).await;
    let refused = second.local_addr().unwrap();
    closed(&mut second).await;
    let line = log.line("connection refused").await;
    assert!(line.starts_with("WARN connection refused") && line.contains(&format!("peer={refused}")), "{line}");

    first.write_all(&frames(Framing::new(Prefix::Buffstreams), ["bad"])).await.unwrap();
    let line = log.line("a handler failed").await;
    assert!(line.contains(&format!("peer={from} id=0}}: WARN a handler failed")), "{line}");
    assert!(line.contains("error=it is bad"), "{line}");
    first.write_all(&[0xff; 8]).await.unwrap();
    closed(&mut first).await;
    let line = log.line("connection closed").await;
    assert!(line.contains("id=0}: WARN connection closed: ") && line.contains(&format!("peer={from}")), "{line}");
}

#[tokio::test]
async fn messages_that_fail_without_an_owner_are_logged_at_a_bounded_rate() {
    let (log, _guard) = Log::begin();
    let connection = Connection::builder().dial_lazy("unix:/nobody/is/here").unwrap();
    for _ in 0..100 {
        connection.send(b"lost").await.unwrap();
    }
    in_time("it is closed", connection.close(Duration::ZERO)).await.unwrap();
    let told = log.0.lock().unwrap().iter().filter(|line| line.contains("WARN message failed: ")).count();
    assert!((20..50).contains(&told), "{told}");
}
