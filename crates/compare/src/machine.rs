//! What the report says of where and when it was made: enough to judge a figure, and nothing about whose machine it
//! is.

use std::time::SystemTime;

use serde::Serialize;

use crate::case::Case;
use crate::system::SYSTEMS;

/// The machine, the moment and the command.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_kib: u64,
    pub(crate) system: String,
    pub(crate) compiler: &'static str,
    pub(crate) date: String,
    pub(crate) command: String,
    /// Processes that wanted to run when the measurement began, on average over a minute: of others, if any.
    pub(crate) load_at_start: String,
    pub(crate) absent: Vec<Absent>,
}

/// A system that was not measured, and why.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Absent {
    pub(crate) system: &'static str,
    pub(crate) why: String,
}

impl Machine {
    pub(crate) fn here(cases: &[Case]) -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let memory = read("/proc/meminfo");
        let load = read("/proc/loadavg");
        Machine {
            processor: value_of("model name", &read("/proc/cpuinfo")).unwrap_or(std::env::consts::ARCH).into(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_kib: value_of("MemTotal", &memory)
                .and_then(|size| size.trim_end_matches(" kB").parse().ok())
                .unwrap_or_default(),
            system: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim()),
            compiler: env!("VERSION_OF_RUSTC"),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            command: command(),
            load_at_start: load.split_whitespace().next().unwrap_or("unknown").into(),
            absent: absent(cases),
        }
    }
}

/// The command that repeats this.
fn command() -> String {
    let features: Vec<&str> = match (cfg!(feature = "protosocket"), cfg!(feature = "tonic"), cfg!(feature = "zeromq")) {
        (true, true, true) => vec!["peers"],
        (protosocket, tonic, zeromq) => [("protosocket", protosocket), ("tonic", tonic), ("zeromq", zeromq)]
            .into_iter()
            .filter_map(|(name, there)| there.then_some(name))
            .collect(),
    };
    let mut command = "cargo run --release -p compare".to_owned();
    if !features.is_empty() {
        command.push_str(&format!(" --features {}", features.join(",")));
    }
    // Where the report went does not matter.
    let mut arguments: Vec<String> = Vec::new();
    let mut all = std::env::args().skip(1);
    while let Some(argument) = all.next() {
        match argument.split_once('=').map_or(argument.as_str(), |(name, _)| name) {
            "--json" | "--html" if argument.contains('=') => {}
            "--json" | "--html" => drop(all.next()),
            _ => arguments.push(argument),
        }
    }
    if !arguments.is_empty() {
        command.push_str(&format!(" -- {}", arguments.join(" ")));
    }
    command
}

fn absent(cases: &[Case]) -> Vec<Absent> {
    let wanted = |name| cases.iter().flat_map(|case| &case.lanes).any(|lane| lane.system.name == name);
    SYSTEMS
        .iter()
        .filter(|system| system.runner.is_none() && wanted(system.name))
        .map(|system| Absent {
            system: system.name,
            why: format!("built without it: add --features {} (or peers)", system.feature),
        })
        .collect()
}

fn value_of<'a>(key: &str, text: &'a str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_once(':').map(|(_, value)| value.trim())
}
