//! SIGINT and SIGTERM: the first asks the program to end in good order, the second ends it at once. Neither leaves a
//! progress line on the terminal.
//!
//! They are waited for on a thread of their own, so the second one works whatever the rest of the program is stuck in.

use std::io;
use std::process;
use std::sync::Arc;
use std::thread;

use tokio::sync::oneshot;

use crate::report::Report;

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
        let (sender, first) = oneshot::channel();
        watch(sender, Arc::clone(report))?;
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

#[cfg(unix)]
fn watch(first: oneshot::Sender<()>, report: Arc<Report>) -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let mut first = Some(first);
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            match first.take() {
                Some(first) => drop(first.send(())),
                None => {
                    report.finish_at_once();
                    // As a shell reports a program that the signal killed.
                    process::exit(128 + signal)
                }
            }
        }
    })?;
    Ok(())
}

#[cfg(not(unix))]
fn watch(first: oneshot::Sender<()>, report: Arc<Report>) -> io::Result<()> {
    thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                let _ = first.send(());
            }
            if tokio::signal::ctrl_c().await.is_ok() {
                report.finish_at_once();
                process::exit(130);
            }
        });
    })?;
    Ok(())
}
