//! One look at a metrics address: an HTTP request, and what its answer says about listeners and connections.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use prometheus_parse::{Scrape, Value};
use tokio::net::TcpStream;

use crate::args::HostPort;
use crate::shown::shown;

/// Bytes of the longest answer.
const LONGEST: usize = 16 * 1024 * 1024;

/// Which side counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Listener,
    Connection,
}

/// What an address told of all its listeners and connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    roles: BTreeMap<Role, Sums>,
    process: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Default)]
struct Sums {
    names: Vec<String>,
    /// By the metric's name without its first word, over all names and reasons.
    sums: BTreeMap<String, u64>,
    /// The same for each reason.
    reasons: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Sample {
    /// Reads the text format of Prometheus.
    ///
    /// # Errors
    ///
    /// It is another format, or there is nothing of this library in it.
    pub(super) fn read(text: &str) -> Result<Sample, Box<dyn Error + Send + Sync>> {
        let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned())))?;
        let mut sample = Sample::default();
        for read in scrape.samples {
            let (Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value)) = read.value else { continue };
            let Some(metric) = read.metric.strip_prefix("buffstreams_") else {
                if read.metric.starts_with("process_") {
                    sample.process.insert(read.metric, value);
                }
                continue;
            };
            let role = match read.labels.get("role") {
                Some("listener") => Role::Listener,
                Some("connection") => Role::Connection,
                _ => continue,
            };
            let sums = sample.roles.entry(role).or_default();
            // Whoever answers may name things as he likes.
            let label = |name| read.labels.get(name).map(|value| shown(value.as_bytes()));
            if let Some(name) = label("name").filter(|name| !sums.names.contains(name)) {
                sums.names.push(name);
            }
            let value = value.max(0.0) as u64;
            *sums.sums.entry(metric.to_owned()).or_default() += value;
            if let Some(reason) = label("reason") {
                let reasons = sums.reasons.entry(metric.to_owned()).or_default();
                *reasons.entry(reason).or_default() += value;
            }
        }
        sample.roles.values_mut().for_each(|sums| sums.names.sort());
        if sample.roles.is_empty() {
            return Err("it answers, but tells nothing of buffstreams".into());
        }
        Ok(sample)
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.roles.contains_key(&role)
    }

    pub(super) fn names(&self, role: Role) -> &[String] {
        self.roles.get(&role).map_or(&[], |sums| &sums.names)
    }

    /// A metric by its name without `buffstreams_`; `None` if it is not told.
    pub(super) fn get(&self, role: Role, metric: &str) -> Option<u64> {
        self.roles.get(&role)?.sums.get(metric).copied()
    }

    /// The parts of a metric that are not 0, the largest first.
    pub(super) fn reasons(&self, role: Role, metric: &str) -> Vec<(&str, u64)> {
        let reasons = self.roles.get(&role).and_then(|sums| sums.reasons.get(metric));
        let mut parts: Vec<_> = reasons
            .into_iter()
            .flatten()
            .map(|(reason, count)| (reason.as_str(), *count))
            .filter(|(_, count)| *count > 0)
            .collect();
        parts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        parts
    }

    /// A metric of the process, by its name without `process_`.
    pub(super) fn process(&self, metric: &str) -> Option<f64> {
        self.process.get(&format!("process_{metric}")).copied()
    }
}

/// Asks for the numbers.
///
/// # Errors
///
/// Nobody answers in time, or the answer is not one of numbers.
pub(super) async fn scrape(address: &HostPort, patience: Duration) -> Result<Sample, Box<dyn Error + Send + Sync>> {
    let text = match tokio::time::timeout(patience, get(address)).await {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Err(format!("{address} cannot be reached: {error}").into()),
        Err(_) => return Err(format!("{address} does not answer within {patience:?}").into()),
    };
    Sample::read(&text).map_err(|error| format!("{address}: {error}").into())
}

async fn get(address: &HostPort) -> Result<String, Box<dyn Error + Send + Sync>> {
    let host = if address.host.is_empty() { "localhost" } else { &address.host };
    let stream = TcpStream::connect((host, address.port)).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let talk = async {
        let request = Request::get("/metrics").header(HOST, address.to_string()).body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("it answers {status}").into());
        }
        let body = Limited::new(response.into_body(), LONGEST).collect().await?.to_bytes();
        String::from_utf8(body.into()).map_err(|_| "its answer is no text".into())
    };
    tokio::pin!(talk);
    tokio::select! {
        answer = &mut talk => answer,
        // It may be over before its answer has been taken.
        over = connection => match over {
            Ok(()) => talk.await,
            Err(error) => Err(io::Error::other(error).into()),
        },
    }
}
