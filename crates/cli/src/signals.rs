//! SIGINT and SIGTERM: the first asks the program to end in good order, the second ends it at once. Neither leaves a
//! progress line on the terminal. SIGHUP makes the files of TLS be read again; it asks the program to end as the first of
//! the others does if it comes because the terminal is gone, or if there is nothing to read again. Whoever starts the
//! program with SIGHUP ignored, as `nohup` does, wants it to outlive the terminal, and it does.
//!
//! They are waited for on threads of their own, so the second one works whatever the rest of the program is stuck in.

use std::io;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use buffstreams::Error;
use tokio::sync::oneshot;

use crate::report::Report;

/// Reads the files of TLS again.
type Reload = Box<dyn Fn() -> Result<(), Error> + Send>;

/// The first signal, when it comes.
#[derive(Debug)]
pub(crate) struct Signals {
    first: oneshot::Receiver<()>,
}

impl Signals {
    /// Takes the signals over from now on. Before the second one ends the program, the bar of `report` goes.
    ///
    /// # Errors
    ///
    /// The operating system does not let them be handled.
    pub(crate) fn watch(report: &Arc<Report>) -> io::Result<Signals> {
        Signals::watch_all(report, None)
    }

    /// The same where there may be TLS, whose files are read again by `reload`.
    pub(crate) fn watch_with<T>(
        report: &Arc<Report>,
        tls: Option<&T>,
        reload: fn(&T) -> Result<(), Error>,
    ) -> io::Result<Signals>
    where
        T: Clone + Send + 'static,
    {
        let reload = tls.cloned().map(|tls| Box::new(move || reload(&tls)) as Reload);
        Signals::watch_all(report, reload)
    }

    fn watch_all(report: &Arc<Report>, reload: Option<Reload>) -> io::Result<Signals> {
        let (sender, first) = oneshot::channel();
        let end = Arc::new(End(Mutex::new(Some(sender))));
        watch_hangups(&end, reload, report)?;
        watch(end, Arc::clone(report))?;
        Ok(Signals { first })
    }

    /// The first signal has come.
    #[cfg(test)]
    pub(crate) fn raised() -> Signals {
        let (sender, first) = oneshot::channel();
        sender.send(()).expect("it is not dropped");
        Signals { first }
    }

    /// Waits for the first signal.
    pub(crate) async fn first(&mut self) {
        if (&mut self.first).await.is_err() {
            std::future::pending().await
        }
    }
}

/// Asks the program to end in good order, once.
#[derive(Debug)]
struct End(Mutex<Option<oneshot::Sender<()>>>);

impl End {
    /// Whether it had not been asked before.
    fn ask(&self) -> bool {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map(|first| first.send(())).is_some()
    }
}

#[cfg(unix)]
fn watch(end: Arc<End>, report: Arc<Report>) -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            if !end.ask() {
                report.finish_at_once();
                // As a shell reports a program that the signal killed.
                process::exit(128 + signal)
            }
        }
    })?;
    Ok(())
}

#[cfg(not(unix))]
fn watch(end: Arc<End>, report: Arc<Report>) -> io::Result<()> {
    thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                if !end.ask() {
                    report.finish_at_once();
                    process::exit(130);
                }
            }
        });
    })?;
    Ok(())
}

#[cfg(unix)]
fn watch_hangups(end: &Arc<End>, reload: Option<Reload>, report: &Arc<Report>) -> io::Result<()> {
    let may_end = !is_hangup_ignored();
    if reload.is_none() && !may_end {
        return Ok(());
    }
    let had_terminal = has_terminal();
    let mut hangups = signal_hook::iterator::Signals::new([signal_hook::consts::SIGHUP])?;
    let (end, report) = (Arc::clone(end), Arc::clone(report));
    thread::Builder::new().name("hangups".into()).spawn(move || {
        for _ in &mut hangups {
            match &reload {
                Some(reload) if !may_end || !had_terminal || has_terminal() => match reload() {
                    Ok(()) => report.say("TLS: the files were read again"),
                    Err(error) => report.fail(format_args!("TLS goes on with what was read before: {error}")),
                },
                // A shell passes it on, and the system sends it too: it is never the second signal.
                _ => drop(end.ask()),
            }
        }
    })?;
    Ok(())
}

#[cfg(not(unix))]
fn watch_hangups(_: &Arc<End>, _: Option<Reload>, _: &Arc<Report>) -> io::Result<()> {
    Ok(())
}

/// Whether there is a terminal that this process belongs to, and it is not hung up.
#[cfg(unix)]
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

/// Whether the process was started with SIGHUP ignored. Where the system does not tell in a file, it is taken to be so.
#[cfg(unix)]
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u128::from_str_radix(mask.trim(), 16).ok());
    ignored.is_none_or(|mask| mask & 1 << (signal_hook::consts::SIGHUP - 1) != 0)
}
