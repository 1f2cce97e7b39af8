//! When a message counts as settled: an option of all commands that send.

use buffstreams::Prefix;
use clap::ValueEnum;

use super::unusable::Unusable;

/// When a message counts as settled.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeliveryLevel {
    /// The kernel took it
    Sent,
    /// The listener is done with it, and has said so
    Acked,
}

/// # Errors
///
/// There is no way to ask for acknowledgements with this prefix.
pub(super) fn check_acked(prefix: Prefix) -> Result<(), Unusable> {
    if matches!(prefix, Prefix::U8 | Prefix::U16Be | Prefix::U16Le) {
        return Err(Unusable::because(format_args!(
            "--framing {prefix} leaves no way to ask for --delivery acked: use buffstreams, varint, u32* or u64*"
        )));
    }
    Ok(())
}
