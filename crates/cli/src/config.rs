//! `--config FILE`: options from a file, as if they had been typed before those that were.
//!
//! What the file says is turned into arguments and put into the command line, which is then read as always: so every option
//! can stand in the file, and means there what it means when typed. An option that was typed is not taken from the file.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::{Table, Value};

/// The option itself, which has no place in the file.
const CONFIG: &str = "config";

/// A command line with what a file says in its place.
#[derive(Debug)]
pub(crate) struct CommandLine {
    pub(crate) arguments: Vec<OsString>,
    /// The options that the file gave, as `--name`, and the file.
    pub(crate) from_file: Option<(PathBuf, Vec<String>)>,
}

impl CommandLine {
    /// Says where an option comes from that is not as it should be, if it was not typed.
    pub(crate) fn explain(&self, mut error: clap::Error) -> clap::Error {
        let Some((path, names)) = &self.from_file else { return error };
        let Some(ContextValue::String(wrong)) = error.get(ContextKind::InvalidArg) else { return error };
        if let Some(name) = names.iter().find(|name| wrong.split(' ').next() == Some(name)) {
            let tip = StyledStr::from(format!("`{}` stands in {}", &name[2..], path.display()));
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
        }
        error
    }
}

/// Puts what the file of `--config` says, if there is one, into what was typed.
///
/// # Errors
///
/// The file cannot be read, is no TOML, or names what is no option of the command.
pub(crate) fn complete(program: &Command, typed: Vec<OsString>) -> Result<CommandLine, String> {
    let unchanged = |arguments| Ok(CommandLine { arguments, from_file: None });
    // What is missing may be in the file, so nothing is wrong yet; what is wrong is found when the whole is read.
    let Ok(matches) = program.clone().ignore_errors(true).try_get_matches_from(&typed) else {
        return unchanged(typed);
    };
    let Some((name, given)) = matches.subcommand() else { return unchanged(typed) };
    let Some(path) = given.get_one::<PathBuf>(CONFIG).cloned() else { return unchanged(typed) };
    let Some(command) = program.find_subcommand(name) else { return unchanged(typed) };
    let Some(place) = place_of(name, &typed) else { return unchanged(typed) };

    let said = |what: String| format!("{}: {what}", path.display());
    let text = fs::read_to_string(&path).map_err(|error| said(error.to_string()))?;
    let file: Table = text.parse().map_err(|error: toml::de::Error| said(error.to_string()))?;
    let options = options_for(program, command, &file).map_err(said)?;
    let mut arguments = typed;
    let mut names = Vec::new();
    let mut added = Vec::new();
    for (option, value) in options {
        if was_typed(given, option) {
            continue;
        }
        let long = format!("--{}", option.get_long().expect("an option of the file has a name"));
        added.extend(arguments_for(option, &long, value).map_err(said)?);
        names.push(long);
    }
    arguments.splice(place..place, added.into_iter().map(OsString::from));
    Ok(CommandLine { arguments, from_file: Some((path, names)) })
}

/// Behind the name of the command.
fn place_of(name: &str, typed: &[OsString]) -> Option<usize> {
    let mut words = typed.iter().enumerate().skip(1);
    while let Some((place, word)) = words.next() {
        if word == "--config" {
            words.next();
        } else if word == name {
            return Some(place + 1);
        }
    }
    None
}

fn was_typed(given: &ArgMatches, option: &Arg) -> bool {
    given.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine)
}

/// What the file has for this command: what stands above all tables, for the commands that have such an option, and what
/// stands in the command's table, which goes before.
fn options_for<'c, 'f>(
    program: &'c Command,
    command: &'c Command,
    file: &'f Table,
) -> Result<Vec<(&'c Arg, &'f Value)>, String> {
    let mut options: Vec<(&Arg, &Value)> = Vec::new();
    for (name, value) in file {
        match (value, program.find_subcommand(name)) {
            (Value::Table(table), Some(section)) => {
                for name in table.keys() {
                    option(section, name).ok_or_else(|| unknown_in(section, name))?;
                }
            }
            (Value::Table(_), None) => {
                let commands: Vec<_> = program.get_subcommands().map(|command| format!("[{command}]")).collect();
                return Err(format!("[{name}] is no command; there can be {}", commands.join(", ")));
            }
            _ if program.get_subcommands().any(|command| option(command, name).is_some()) => {
                options.extend(option(command, name).map(|option| (option, value)));
            }
            _ => {
                return Err(format!(
                    "`{name}` is an option of no command; write the names as on the command line, without --, such as \
                     `max-message-size`: see `{} help {command}`",
                    program.get_name()
                ));
            }
        }
    }
    if let Some(Value::Table(table)) = file.get(command.get_name()) {
        for (name, value) in table {
            options.retain(|(option, _)| option.get_long() != Some(name));
            options.extend(option(command, name).map(|option| (option, value)));
        }
    }
    Ok(options)
}

fn option<'c>(command: &'c Command, name: &str) -> Option<&'c Arg> {
    options(command).find(|option| option.get_long() == Some(name))
}

fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    let is_asking = |option: &Arg| {
        matches!(option.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version)
    };
    command
        .get_arguments()
        .filter(move |option| option.get_long().is_some_and(|long| long != CONFIG) && !is_asking(option))
}

fn unknown_in(command: &Command, name: &str) -> String {
    let known: Vec<_> = options(command).filter_map(Arg::get_long).collect();
    format!("`{name}` in [{command}] is no option of that command; it has {}", known.join(", "))
}

/// An entry as it would be typed.
fn arguments_for(option: &Arg, long: &str, value: &Value) -> Result<Vec<String>, String> {
    let typed = |value: &Value| {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Boolean(is) => is.to_string(),
            Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
                return Err(format!("`{}` must be text, a number, or true or false", &long[2..]));
            }
        };
        Ok(format!("{long}={text}"))
    };
    match (option.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(true)) => Ok(vec![long.to_owned()]),
        (ArgAction::SetTrue, Value::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, _) => Err(format!("`{}` must be true or false", &long[2..])),
        (ArgAction::Append, Value::Array(values)) => values.iter().map(typed).collect(),
        (_, value) => Ok(vec![typed(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read when `typed` is typed and the file says `text`.
    fn read(text: &str, typed: &[&str]) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let program = Command::new("program")
            .arg(Arg::new(CONFIG).long("config").global(true).value_parser(clap::value_parser!(PathBuf)))
            .subcommand(
                Command::new("one")
                    .arg(Arg::new("place").required(true))
                    .arg(Arg::new("size").long("max-size"))
                    .arg(Arg::new("loud").long("loud").action(ArgAction::SetTrue))
                    .arg(Arg::new("list").long("list").action(ArgAction::Append))
                    .arg(Arg::new("needy").long("needy").requires("size")),
            )
            .subcommand(Command::new("two").arg(Arg::new("width").long("width")));
        let path = file.path().to_str().unwrap();
        let typed = typed.iter().map(|word| word.replace("FILE", path).into()).collect();
        let line = complete(&program, typed).map_err(|error| error.replace(path, "FILE"))?;
        Ok(line.arguments.into_iter().map(|word| word.into_string().unwrap().replace(path, "FILE")).collect())
    }

    #[test]
    fn what_the_file_says_comes_behind_the_command_and_before_what_was_typed() {
        let text = "max-size = 7\nwidth = '3'\n[one]\nloud = true\nlist = ['a', 'b']\n[two]\nwidth = 4\n";
        for typed in [["program", "one", "--config", "FILE", "here"], ["program", "one", "here", "--config", "FILE"]] {
            let mut expected = vec!["program", "one", "--max-size=7", "--list=a", "--list=b", "--loud"];
            let mut read = read(text, &typed).unwrap();
            expected.extend(&typed[2..]);
            read[2..6].sort();
            expected[2..6].sort();
            assert_eq!(read, expected);
        }
        let read = read(text, &["program", "--config=FILE", "two"]).unwrap();
        assert_eq!(
            read,
            ["program", "--config=FILE", "two", "--width=4"],
            "the table goes before what stands above it"
        );
    }

    #[test]
    fn what_was_typed_replaces_what_the_file_says() {
        let text = "[one]\nmax-size = 7\nlist = ['a', 'b']\nloud = false\n";
        let typed = ["program", "one", "--config", "FILE", "--max-size", "9", "here", "--list=c"];
        assert_eq!(read(text, &typed).unwrap(), typed);
        let typed = ["program", "one", "--config", "FILE", "--needy", "x", "here"];
        assert!(read(text, &typed).unwrap().contains(&"--max-size=7".to_owned()), "what it needs is in the file");
    }

    #[test]
    fn what_is_no_option_is_refused_by_its_name() {
        let cases = [
            ("max_size = 7", "FILE: `max_size` is an option of no command"),
            ("config = 'x'", "`config` is an option of no command"),
            ("[one]\nwidth = 7", "`width` in [one] is no option of that command; it has max-size, loud, list, needy"),
            ("[one]\nplace = 'x'", "`place` in [one]"),
            ("[two]\nmax-size = 7", "`max-size` in [two]"),
            ("[three]", "[three] is no command; there can be [one], [two]"),
            ("loud = 'yes'", "`loud` must be true or false"),
            ("max-size = [1]", "`max-size` must be text, a number, or true or false"),
            ("max-size = ", "FILE: TOML parse error at line 1"),
        ];
        for (text, says) in cases {
            let error = read(text, &["program", "one", "--config", "FILE", "here"]).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert!(read("", &["program", "one", "--config", "FILE.nowhere", "here"]).is_err());
    }
}
