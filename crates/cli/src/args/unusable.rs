//! Why a command line cannot be used: what clap finds, and what it cannot see.

use std::fmt;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// What is wrong with options of which clap takes each.
#[derive(Debug)]
pub(crate) struct Unusable {
    reason: String,
    /// The names of options that say nothing without another one, which is not there.
    lacking: &'static [&'static str],
}

impl Unusable {
    pub(crate) fn because(reason: impl fmt::Display) -> Unusable {
        Unusable { reason: reason.to_string(), lacking: &[] }
    }

    /// The same of options that say nothing without another one.
    pub(crate) fn lacking(options: &'static [&'static str], reason: impl fmt::Display) -> Unusable {
        Unusable { lacking: options, ..Unusable::because(reason) }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Unusable {}

/// What is wrong with a command line.
#[derive(Debug)]
pub(crate) enum Wrong {
    /// Or it only asks for help.
    Clap(clap::Error),
    Unusable(Unusable),
}

impl Wrong {
    /// What clap has to say of it, where it is about this command.
    pub(crate) fn told_of(self, command: &mut clap::Command) -> clap::Error {
        match self {
            Wrong::Clap(error) => error,
            Wrong::Unusable(unusable) => command.error(ErrorKind::ValueValidation, unusable),
        }
    }

    /// The words alone, without how the command is used.
    pub(crate) fn words(&self) -> String {
        match self {
            Wrong::Unusable(unusable) => unusable.to_string(),
            Wrong::Clap(error) => {
                let text = error.render().to_string();
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                let text = text.split("\n\nUsage: ").next().unwrap_or_default();
                text.split("\n\nFor more information").next().unwrap_or_default().to_owned()
            }
        }
    }

    /// What clap misses, each as it would be typed.
    pub(crate) fn missing(&self) -> &[String] {
        match self {
            Wrong::Clap(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
                match error.get(ContextKind::InvalidArg) {
                    Some(ContextValue::Strings(missing)) => missing,
                    _ => &[],
                }
            }
            _ => &[],
        }
    }

    /// The names of options that say nothing without another one, where that is what is wrong.
    pub(crate) fn lacking(&self) -> &'static [&'static str] {
        match self {
            Wrong::Unusable(unusable) => unusable.lacking,
            Wrong::Clap(_) => &[],
        }
    }

    /// Whether an option says nothing without another one.
    pub(crate) fn is_lacking(&self) -> bool {
        !self.missing().is_empty() || !self.lacking().is_empty()
    }
}
