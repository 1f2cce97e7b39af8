//! How messages are printed: an option of all commands that print them.

use clap::ValueEnum;

use crate::schema::Schema;

/// How `listen` prints messages.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// The message and a newline; to a terminal with control characters escaped
    Lines,
    /// Lower-case hex, one line each
    Hex,
    /// Protobuf's JSON mapping, one object per line; needs --type
    Json,
    /// Any protobuf message, by the numbers of its fields, in protoscope's notation; one line each
    Fields,
    /// An unsigned varint length before each, as protobuf's writeDelimitedTo
    Delimited,
    /// Not at all; they are only counted
    None,
}

/// How messages are printed, with what that takes.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    Lines,
    Hex,
    Json(Schema),
    Fields,
    Delimited,
    /// With times and senders.
    Recording,
    None,
}
