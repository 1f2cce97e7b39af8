//! `--config FILE`: options from a file, as if they had been typed before those that were.
//!
//! What the file says is turned into arguments and put into the command line, which is then read as always: so every option
//! can stand in the file, and means there what it means when typed. An option that was typed is not taken from the file.
//!
//! What stands above all tables is for commands that have such an option and can use it: where it says nothing without
//! another option, which is not there, it is left out. What stands in a command's own table is meant for it, and is wrong then.
//! What is wrong is found by asking clap, and not by rules of its own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::{Table, Value};

use crate::args::{Unusable, Wrong};

/// The option itself, which has no place in the file.
const CONFIG: &str = "config";

/// Options that are never left out: whoever asks for TLS in part shall not listen without it.
const NEVER_LEFT_OUT: &str = "ListenTls";

/// Reads what was typed with what the file of `--config` says, if there is one, in its place.
///
/// # Errors
///
/// What `read` finds wrong, with the file and the place in it where that comes from there; or the file cannot be read, is no
/// TOML, or names what is no option of the command.
pub(crate) fn read<T>(
    program: &Command,
    typed: &[OsString],
    read: impl Fn(&[OsString]) -> Result<T, Wrong>,
) -> Result<T, Wrong> {
    match Completed::of(program, typed)? {
        None => read(typed),
        Some(completed) => completed.read(read),
    }
}

/// The command line as it was typed, as far as it can be read: what is missing may be in the file.
pub(crate) fn typed_so_far(program: &Command, typed: &[OsString]) -> Option<ArgMatches> {
    program.clone().ignore_errors(true).try_get_matches_from(typed).ok()
}

/// A command line with what a file says in its place.
struct Completed<'t> {
    typed: &'t [OsString],
    path: PathBuf,
    command: String,
    /// Where in what was typed the options from the file stand.
    place: usize,
    options: Vec<FromFile>,
}

/// An option that the file has for the command.
#[derive(Clone, Debug)]
struct FromFile {
    /// The option as it is typed.
    long: String,
    arguments: Vec<OsString>,
    /// It stands above all tables.
    is_general: bool,
    may_be_left_out: bool,
    /// Options without which clap does not take this one, and what those ask for, each as it would be typed.
    asks: BTreeSet<String>,
}

impl<'t> Completed<'t> {
    /// `None` if no file was named.
    fn of(program: &Command, typed: &'t [OsString]) -> Result<Option<Completed<'t>>, Wrong> {
        let matches = typed_so_far(program, typed);
        let Some((name, given)) = matches.as_ref().and_then(ArgMatches::subcommand) else { return Ok(None) };
        let Some(path) = given.get_one::<PathBuf>(CONFIG).cloned() else { return Ok(None) };
        let Some(command) = program.find_subcommand(name) else { return Ok(None) };
        let Some(place) = place_of(name, typed) else { return Ok(None) };

        let said = |what: String| Wrong::Unusable(Unusable::because(format_args!("{}: {what}", path.display())));
        let text = fs::read_to_string(&path).map_err(|error| said(error.to_string()))?;
        let file: Table = text.parse().map_err(|error: toml::de::Error| said(error.to_string()))?;
        let mut options = Vec::new();
        for (option, value, is_general) in options_for(program, command, &file).map_err(said)? {
            if !was_typed(given, option) {
                options.push(FromFile::new(program, command, option, value, is_general).map_err(said)?);
            }
        }
        Ok(Some(Completed { typed, path, command: name.to_owned(), place, options }))
    }

    fn read<T>(mut self, read: impl Fn(&[OsString]) -> Result<T, Wrong>) -> Result<T, Wrong> {
        loop {
            let wrong = match read(&self.line_of(|_| true)) {
                Ok(read) => return Ok(read),
                Err(wrong) => wrong,
            };
            let blamed = self.blamed(&wrong, &read);
            let is_left_out = |option: &FromFile| {
                wrong.is_lacking() && option.may_be_left_out && blamed.iter().any(|other| other.long == option.long)
            };
            let (left_out, options): (Vec<_>, Vec<_>) = self.options.into_iter().partition(is_left_out);
            self.options = options;
            if left_out.is_empty() {
                return Err(self.placed(wrong, &blamed));
            }
        }
    }

    /// The whole line, with those options from the file that `is_in` says.
    fn line_of(&self, is_in: impl Fn(&FromFile) -> bool) -> Vec<OsString> {
        let mut line = self.typed.to_vec();
        let options = self.options.iter().filter(|option| is_in(option));
        line.splice(self.place..self.place, options.flat_map(|option| option.arguments.iter().cloned()));
        line
    }

    /// The options from the file that have to do with what is wrong: those that lack something, where that is what is wrong,
    /// or else each without which it would not be wrong in this way.
    fn blamed<T>(&self, wrong: &Wrong, read: impl Fn(&[OsString]) -> Result<T, Wrong>) -> Vec<FromFile> {
        let is_blamed = |option: &&FromFile| {
            if wrong.is_lacking() {
                let lacks_it = wrong.missing().iter().any(|missing| option.asks.contains(missing));
                return lacks_it || wrong.lacking().contains(&&option.long[2..]);
            }
            // What asks for it goes with it.
            let others = self.line_of(|other| other.long != option.long && !other.asks_for(&option.long));
            read(&others).err().is_none_or(|other| other.words() != wrong.words())
        };
        self.options.iter().filter(is_blamed).cloned().collect()
    }

    /// What is wrong, with its place if that is in the file.
    fn placed(&self, wrong: Wrong, blamed: &[FromFile]) -> Wrong {
        if blamed.is_empty() {
            return wrong;
        }
        let place = |option: &FromFile| match option.is_general {
            true => format!("`{}` above all tables", &option.long[2..]),
            false => format!("`{}` in [{}]", &option.long[2..], self.command),
        };
        let places: Vec<String> = blamed.iter().map(place).collect();
        let asked: Vec<&str> = wrong
            .missing()
            .iter()
            .filter(|missing| blamed.iter().any(|option| option.asks.contains(*missing)))
            .map(String::as_str)
            .collect();
        let what = match &asked[..] {
            [] => wrong.words(),
            asked => format!("{} needs {} with that", self.command, asked.join(", ")),
        };
        Wrong::Unusable(Unusable::because(format_args!("{}: {}: {what}", self.path.display(), places.join(", "))))
    }
}

impl FromFile {
    fn new(
        program: &Command,
        command: &Command,
        option: &Arg,
        value: &Value,
        is_general: bool,
    ) -> Result<FromFile, String> {
        let long = format!("--{}", option.get_long().expect("an option of the file has a name"));
        let arguments: Vec<OsString> = arguments_for(option, &long, value)?.into_iter().map(OsString::from).collect();
        let is_kept = command
            .get_groups()
            .any(|group| group.get_id() == NEVER_LEFT_OUT && group.get_args().any(|member| member == option.get_id()));
        let missing = |arguments: &[OsString]| -> BTreeSet<String> {
            let line = [OsString::from(program.get_name()), OsString::from(command.get_name())];
            let alone = program.clone().try_get_matches_from(line.iter().chain(arguments));
            alone.err().map(|error| Wrong::Clap(error).missing().iter().cloned().collect()).unwrap_or_default()
        };
        let asks = missing(&arguments).difference(&missing(&[])).cloned().collect();
        Ok(FromFile { long, arguments, is_general, may_be_left_out: is_general && !is_kept, asks })
    }

    fn asks_for(&self, long: &str) -> bool {
        self.asks.iter().any(|asked| asked.split(' ').next() == Some(long))
    }
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

/// What the file has for this command, and whether it stands above all tables, for the commands that have such an option, or
/// in the command's table, which goes before.
fn options_for<'c, 'f>(
    program: &'c Command,
    command: &'c Command,
    file: &'f Table,
) -> Result<Vec<(&'c Arg, &'f Value, bool)>, String> {
    let mut options: Vec<(&Arg, &Value, bool)> = Vec::new();
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
                options.extend(option(command, name).map(|option| (option, value, true)));
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
            options.retain(|(option, ..)| option.get_long() != Some(name));
            options.extend(option(command, name).map(|option| (option, value, false)));
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
    use clap::ArgGroup;

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
                    .arg(Arg::new("needy").long("needy").requires("size"))
                    .arg(Arg::new("needier").long("needier").requires("needy"))
                    .arg(Arg::new("half").long("half").requires("size"))
                    .group(ArgGroup::new(NEVER_LEFT_OUT).arg("half")),
            )
            .subcommand(Command::new("two").arg(Arg::new("width").long("width")));
        let path = file.path().to_str().unwrap();
        let typed: Vec<OsString> = typed.iter().map(|word| word.replace("FILE", path).into()).collect();
        let took = |line: &[OsString]| match program.clone().try_get_matches_from(line) {
            Ok(_) => Ok(line.to_vec()),
            Err(error) => Err(Wrong::Clap(error)),
        };
        let line = super::read(&program, &typed, took).map_err(|wrong| wrong.words().replace(path, "FILE"))?;
        Ok(line.into_iter().map(|word| word.into_string().unwrap().replace(path, "FILE")).collect())
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
    fn what_cannot_be_used_alone_is_left_out_unless_it_was_meant_for_the_command() {
        let typed = ["program", "one", "--config", "FILE", "here"];
        let needy = "needy = 1\nneedier = 2\n";
        assert_eq!(read(needy, &typed).unwrap(), typed, "one lacks a size, and the other that one");
        assert_eq!(read(&format!("{needy}[one]\nloud = true"), &typed).unwrap()[2], "--loud", "others stay");
        let whole = read(&format!("{needy}[one]\nmax-size = 3"), &typed).unwrap();
        assert_eq!(whole.len(), typed.len() + 3, "what they need is there: {whole:?}");
        let cases = [
            ("[one]\nneedy = 1", "FILE: `needy` in [one]: one needs --max-size <size> with that"),
            (
                "needy = 1\n[one]\nneedier = 2",
                "FILE: `needier` in [one]: one needs --max-size <size>, --needy <needy> with that",
            ),
            ("half = 1", "FILE: `half` above all tables: one needs --max-size <size> with that"),
            ("half = 1\n[one]\nneedy = 1", "FILE: `half` above all tables, `needy` in [one]: one needs"),
        ];
        for (text, says) in cases {
            let error = read(text, &typed).unwrap_err();
            assert!(error.starts_with(says), "{text}: {error}");
        }
        let error =
            read("max-size = 3", &["program", "one", "--config", "FILE", "here", "--needier", "2"]).unwrap_err();
        assert!(error.starts_with("the following"), "it was typed: {error}");
    }

    #[test]
    fn what_is_no_option_is_refused_by_its_name() {
        let cases = [
            ("max_size = 7", "FILE: `max_size` is an option of no command"),
            ("config = 'x'", "`config` is an option of no command"),
            (
                "[one]\nwidth = 7",
                "`width` in [one] is no option of that command; it has max-size, loud, list, needy, needier, half",
            ),
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
