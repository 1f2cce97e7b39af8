//! What `export` takes.

use std::path::PathBuf;

use clap::Args;

use super::output::{Output, OutputFormat};
use super::schema::TypeArguments;
use super::unusable::Unusable;

/// Write the messages of a recording to standard output, delimited or in any form in which `listen` prints them
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams export monday.rec > monday.delimited
  buffstreams export monday.rec --output fields
  buffstreams export monday.rec --output none
  buffstreams export monday.rec --proto reading.proto --type plant.Reading --output json
  buffstreams export monday.rec | buffstreams send localhost:5031 --input delimited")]
pub(crate) struct ExportArguments {
    /// A recording of `buffstreams record`, or `-` for standard input
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages are written [default: json with --type, else delimited]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

impl ExportArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        self.output().map(drop)
    }

    pub(crate) fn output(&self) -> Result<Output, Unusable> {
        self.types.output(self.output, Output::Delimited)
    }
}
