//! `buffstreams completions` and `buffstreams man`: the command line told to shells and to `man`, made from what it is read by.

use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use roff::{Roff, roman};

use crate::args::program;
use crate::{Outcome, Status, output};

/// What stands before the examples in a command's help.
const EXAMPLES: &str = "Examples:\n";

/// Prints the completions for a shell.
pub(crate) fn completions(shell: Shell) -> Outcome {
    let mut program = program();
    let name = program.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut script);
    output::put(&script)?;
    Ok(Status::Success)
}

/// Prints the page of the program; or writes all pages into this directory.
pub(crate) fn run(directory: Option<&Path>) -> Outcome {
    let mut program = program().disable_help_subcommand(true);
    program.build();
    let Some(directory) = directory else {
        output::put(&page(&program)?)?;
        return Ok(Status::Success);
    };
    let named = |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    fs::create_dir_all(directory).map_err(|error| named(directory, error))?;
    for command in [&program].into_iter().chain(program.get_subcommands()) {
        let path = directory.join(Man::new(command.clone()).get_filename());
        fs::write(&path, page(command)?).map_err(|error| named(&path, error))?;
    }
    Ok(Status::Success)
}

/// The manual page of a command.
fn page(command: &Command) -> io::Result<Vec<u8>> {
    let man =
        Man::new(command.clone()).manual("BuffStreams").source(concat!("buffstreams ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut end = Roff::new();
    match after.strip_prefix(EXAMPLES) {
        Some(examples) => {
            end.control("SH", ["EXAMPLES"]);
            // As they are: to fill lines would tear them.
            end.control("nf", []);
            for line in examples.lines() {
                end.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
            }
            end.control("fi", []);
        }
        None => {
            end.control("SH", ["EXIT STATUS"]);
            end.text([roman(after.trim_start_matches("Exit status: "))]);
        }
    }
    end.to_writer(&mut page)?;
    Ok(page)
}
