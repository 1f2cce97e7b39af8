//! The command line as typed: what each subcommand takes, in a file of its own, and what several take.
//!
//! Parsing is also checking: what leaves here names a prefix, a maximum and a message type that fit together, or
//! the program has already ended with exit status 2 and a sentence that says what to write instead.

mod delivery;
mod demo;
mod export;
mod failed;
mod framing;
mod host_port;
mod limits;
mod listen;
mod output;
mod quantities;
mod record;
mod replay;
mod schema;
mod send;
mod tap;
mod tls;
mod top;
mod unusable;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgMatches, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::bench::BenchArguments;
use crate::config;

pub(crate) use delivery::DeliveryLevel;
pub(crate) use demo::DemoArguments;
pub(crate) use export::ExportArguments;
pub(crate) use failed::{FailedAction, FailedArguments};
pub(crate) use framing::WireArguments;
pub(crate) use host_port::HostPort;
pub(crate) use limits::ListenLimits;
pub(crate) use listen::{ListenArguments, ReceiveArguments};
pub(crate) use output::Output;
pub(crate) use quantities::{parse_duration, parse_size};
pub(crate) use record::RecordArguments;
pub(crate) use replay::{ReplayArguments, Speed};
pub(crate) use send::{Delivery, Input, SendArguments};
pub(crate) use tap::TapArguments;
pub(crate) use tls::SendTls;
pub(crate) use top::TopArguments;
pub(crate) use unusable::{Unusable, Wrong};

/// Streams length-prefixed messages over TCP: listens for them, sends them, shows how fast that goes.
#[derive(Debug, Parser)]
#[command(name = "buffstreams", version, max_term_width = 100, after_help = EXIT_STATUS)]
struct CommandLine {
    /// Take options from this file too; those that are typed go before
    ///
    /// TOML, with the names of the options: `max-message-size = "64KiB"`, `no-sessions = true`, `proto = ["a.proto", "b.proto"]`.
    /// What stands in `[listen]` is for `buffstreams listen`; what stands above all tables, for every command that has such
    /// an option. There it is left out for a command to which it says nothing without another option that is not there, as
    /// `window` without `delivery = "acked"`; but a listener never does without TLS for that. Paths are as on the command line.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status: 0 when everything went through, 1 when something failed, 2 when the command line cannot be used.";

/// What the program is asked to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Listen(ListenArguments),
    Send(SendArguments),
    Tap(TapArguments),
    Record(RecordArguments),
    Replay(ReplayArguments),
    Export(ExportArguments),
    Failed(FailedArguments),
    Bench(BenchArguments),
    Top(TopArguments),
    Demo(DemoArguments),

    /// Print what a shell needs to complete the command line
    #[command(after_help = "\
Examples:
  mkdir -p ~/.local/share/bash-completion/completions
  buffstreams completions bash > ~/.local/share/bash-completion/completions/buffstreams
  buffstreams completions zsh > ~/.zfunc/_buffstreams
  buffstreams completions fish > ~/.config/fish/completions/buffstreams.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },

    /// Print the manual page, or write those of all commands into a directory
    #[command(after_help = "\
Examples:
  buffstreams man | man -l -
  buffstreams man ~/.local/share/man/man1
  man -M ~/.local/share/man buffstreams-listen")]
    Man {
        /// Where to write the pages; created if it is not there
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

/// The whole command line of the program, for those who describe it.
pub(crate) fn program() -> clap::Command {
    CommandLine::command()
}

/// Reads the program's own command line, and the file that it names; ends the program when they cannot be used, or when it
/// only asks for help.
pub(crate) fn parse() -> Command {
    let typed: Vec<OsString> = std::env::args_os().collect();
    config::read(&program(), &typed, read).unwrap_or_else(|wrong| {
        let mut program = program();
        program.build();
        let matches = config::typed_so_far(&program, &typed);
        let name = matches.as_ref().and_then(ArgMatches::subcommand_name).unwrap_or_default();
        match program.find_subcommand_mut(name) {
            Some(command) => wrong.told_of(command).exit(),
            None => wrong.told_of(&mut program).exit(),
        }
    })
}

fn read(line: &[OsString]) -> Result<Command, Wrong> {
    let command = CommandLine::try_parse_from(line).map_err(Wrong::Clap)?.command;
    command.check().map_err(Wrong::Unusable)?;
    Ok(command)
}

impl Command {
    /// Finds what clap does not see: all that can be found before a recording is opened.
    fn check(&self) -> Result<(), Unusable> {
        match self {
            Command::Listen(arguments) => arguments.check(),
            Command::Send(arguments) => arguments.check(),
            Command::Tap(arguments) => arguments.check(),
            Command::Record(arguments) => arguments.check(),
            Command::Replay(arguments) => arguments.check(),
            Command::Export(arguments) => arguments.check(),
            Command::Bench(arguments) => arguments.check(),
            Command::Failed(_)
            | Command::Top(_)
            | Command::Demo(_)
            | Command::Completions { .. }
            | Command::Man { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        CommandLine::command().debug_assert();
    }

    /// The command lines of this program in the examples of a command's help.
    fn examples(command: &clap::Command) -> Vec<Vec<String>> {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let Some((_, examples)) = help.split_once("Examples:\n") else { return Vec::new() };
        let lines = examples.replace("|\n", "| ");
        let parts = lines.lines().flat_map(|line| line.split(" | ")).map(|part| part.trim());
        let own = parts.filter(|part| part.starts_with("buffstreams "));
        own.map(|part| {
            let words = shlex::split(part).unwrap_or_else(|| panic!("a shell takes {part}"));
            words.into_iter().take_while(|word| !word.starts_with('>')).collect()
        })
        .collect()
    }

    #[test]
    fn every_command_has_examples_and_every_example_can_be_typed() {
        for command in program().get_subcommands() {
            let examples = examples(command);
            assert!(examples.iter().any(|words| words[1] == command.get_name()), "{}", command.get_name());
            for words in examples {
                if let Err(error) = CommandLine::try_parse_from(&words) {
                    panic!("{words:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn under_limits_stand_the_limits_and_nothing_else() {
        let limits = ListenLimits::augment_args(clap::Command::new("limits"));
        let limits: Vec<_> = limits.get_arguments().map(|arg| arg.get_id()).collect();
        let mut program = program();
        program.build();
        for name in ["listen", "record"] {
            let command = program.find_subcommand(name).unwrap();
            let under = command.get_arguments().filter(|arg| arg.get_help_heading() == Some("Limits"));
            assert_eq!(under.map(|arg| arg.get_id()).collect::<Vec<_>>(), limits, "{name}");
        }
    }

    #[test]
    fn a_type_says_json_unless_another_format_is_named() {
        let parse = |extra: &[&str]| {
            let proto = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gtfs-realtime/gtfs-realtime.proto");
            let base = ["buffstreams", "listen", ":0", "--proto", proto, "--type", "transit_realtime.FeedMessage"];
            let line = CommandLine::try_parse_from(base.iter().chain(extra)).unwrap();
            match line.command {
                Command::Listen(arguments) => arguments.output().unwrap(),
                _ => unreachable!("listen was asked for"),
            }
        };
        assert!(matches!(parse(&[]), Output::Json(_)));
        assert!(matches!(parse(&["--output", "json"]), Output::Json(_)));
        assert!(matches!(parse(&["--output", "hex"]), Output::Hex));
    }
}
