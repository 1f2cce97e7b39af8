//! SIGHUP, which makes the files of TLS be read again.

use std::io;
use std::sync::Arc;

use buffstreams::Error;

use crate::report::Report;

/// From now on SIGHUP does not end the program, but makes it read its files again.
#[cfg(unix)]
pub(crate) fn reload_at_hangup(
    read_again: impl Fn() -> Result<(), Error> + Send + 'static,
    report: &Arc<Report>,
) -> io::Result<()> {
    let report = Arc::clone(report);
    let mut hangups = signal_hook::iterator::Signals::new([signal_hook::consts::SIGHUP])?;
    let reload = move || {
        for _ in &mut hangups {
            match read_again() {
                Ok(()) => report.say("TLS: the files were read again"),
                Err(error) => report.fail(format_args!("TLS goes on with what was read before: {error}")),
            }
        }
    };
    std::thread::Builder::new().name("reload".into()).spawn(reload)?;
    Ok(())
}

#[cfg(not(unix))]
pub(crate) fn reload_at_hangup(_: impl Fn() -> Result<(), Error> + Send + 'static, _: &Arc<Report>) -> io::Result<()> {
    Ok(())
}
