//! `--metrics`: what the library counts, in Prometheus' text format over plain HTTP.
//!
//! All numbers of an answer are of one moment. Strangers who connect and say nothing, or much, take a bounded number of
//! places for a bounded time, and nothing from the messages.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::args::HostPort;
use crate::report::Report;

/// Requests that may be under way at a time, and how long one may take to come.
const MOST: usize = 64;
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait when the machine has no file descriptor left.
const STARVED: Duration = Duration::from_millis(100);

/// Where numbers will be served: bound, and not yet said.
#[derive(Debug)]
pub(crate) struct Metrics {
    listener: TcpListener,
}

impl Metrics {
    /// `None` if nobody asks for them.
    ///
    /// # Errors
    ///
    /// The address cannot be listened on.
    pub(crate) async fn bind(address: Option<&HostPort>) -> io::Result<Option<Metrics>> {
        let Some(address) = address else { return Ok(None) };
        let bound = match address.host.as_str() {
            "" => match TcpListener::bind(("::", address.port)).await {
                Err(_) => TcpListener::bind(("0.0.0.0", address.port)).await,
                bound => bound,
            },
            host => TcpListener::bind((host, address.port)).await,
        };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("--metrics {address}: {error}"));
        Ok(Some(Metrics { listener: bound.map_err(named)? }))
    }

    /// Says where they are. Whoever asks before they are served waits.
    pub(crate) fn announce(&self, report: &Report) -> io::Result<()> {
        report.say(format_args!("metrics on {}", self.listener.local_addr()?));
        Ok(())
    }

    /// Serves from now on. Whatever is to stand in the first answer counts already.
    pub(crate) fn serve(self) -> Result<(), metrics::SetRecorderError<PrometheusRecorder>> {
        let recorder = PrometheusBuilder::new().build_recorder();
        let numbers = Arc::new(Numbers { handle: recorder.handle(), process: metrics_process::Collector::default() });
        metrics::set_global_recorder(recorder)?;
        numbers.process.describe();
        tokio::spawn(accept(self.listener, numbers));
        Ok(())
    }
}

struct Numbers {
    handle: PrometheusHandle,
    process: metrics_process::Collector,
}

impl Numbers {
    fn render(&self) -> String {
        self.process.collect();
        let _published = buffstreams::metrics::publish();
        self.handle.render()
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let (status, text) = match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, self.render()),
            (&Method::GET | &Method::HEAD, _) => (StatusCode::NOT_FOUND, "the metrics are at /metrics\n".to_owned()),
            _ => (StatusCode::METHOD_NOT_ALLOWED, "the metrics can only be read\n".to_owned()),
        };
        let mut response =
            Response::builder().status(status).header(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
        if status == StatusCode::METHOD_NOT_ALLOWED {
            response = response.header(ALLOW, "GET, HEAD");
        }
        response.body(Full::from(text)).expect("these headers are legal")
    }
}

async fn accept(listener: TcpListener, numbers: Arc<Numbers>) {
    let places = Arc::new(Semaphore::new(MOST));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("it is never closed");
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(STARVED).await;
            continue;
        };
        let numbers = Arc::clone(&numbers);
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let response = numbers.answer(&request);
                async { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(16 * 1024).keep_alive(false);
            // Whoever does not speak HTTP, or does not read, is no matter of the messages.
            let _ = tokio::time::timeout(PATIENCE, http.serve_connection(TokioIo::new(stream), answer)).await;
            drop(place);
        });
    }
}
