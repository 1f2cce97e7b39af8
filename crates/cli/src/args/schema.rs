//! What the messages mean: options of all commands that print messages, or read them.

use std::path::PathBuf;

use clap::Args;

use crate::schema::Schema;

use super::output::{Output, OutputFormat};
use super::unusable::Unusable;

pub(super) const JSON_NEEDS_TYPE: &str = "json needs a message type: add --proto FILE --type pkg.Message";

/// What the messages mean, for the `json` formats.
#[derive(Debug, Args)]
pub(crate) struct TypeArguments {
    /// The schema that has the message type; may be repeated
    #[arg(long, value_name = "FILE", requires = "message_type")]
    proto: Vec<PathBuf>,

    /// Where the schema's imports are looked for; may be repeated [default: beside the schema]
    #[arg(long, value_name = "DIR", requires = "proto")]
    include: Vec<PathBuf>,

    /// The message type, with its package
    #[arg(id = "message_type", long = "type", value_name = "pkg.Message", requires = "proto")]
    message_type: Option<String>,
}

impl TypeArguments {
    pub(super) fn output(&self, format: Option<OutputFormat>, default: Output) -> Result<Output, Unusable> {
        Ok(match (format, self.schema()?) {
            (None, None) => default,
            (Some(OutputFormat::Lines), _) => Output::Lines,
            (Some(OutputFormat::Hex), _) => Output::Hex,
            (Some(OutputFormat::Fields), _) => Output::Fields,
            (Some(OutputFormat::Delimited), _) => Output::Delimited,
            (Some(OutputFormat::None), _) => Output::None,
            (None | Some(OutputFormat::Json), Some(schema)) => Output::Json(schema),
            (Some(OutputFormat::Json), None) => return Err(Unusable::because(JSON_NEEDS_TYPE)),
        })
    }

    pub(super) fn schema(&self) -> Result<Option<Schema>, Unusable> {
        let Some(message_type) = self.message_type.as_deref() else { return Ok(None) };
        Schema::load(&self.proto, &self.include, message_type).map(Some).map_err(Unusable::because)
    }
}
