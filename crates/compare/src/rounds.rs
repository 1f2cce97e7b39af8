//! The whole measurement: the systems of a case take turns, A B C A B C, so that what else the machine does meanwhile
//! touches all of them. The first turn of each is not counted. A system whose run fails leaves the case.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Measure;
use crate::case::{self, Case, Lane};
use crate::machine::Machine;
use crate::report::{self, Outcome};
use crate::run::{self, Figures};
use crate::{Result, goal, meter, page};

const RUNS: u32 = 5;
const RUNS_QUICKLY: u32 = 3;

/// What the runs of a lane came to, in the order of the rounds.
pub(crate) type Runs = Result<Vec<Figures>, String>;

/// Measures what is asked for, shows it, and writes the report.
pub(crate) fn measure(asked: &Measure) -> Result<ExitCode> {
    let cases = chosen(asked)?;
    let machine = Machine::here(&cases);
    let open_files = meter::raise_open_files()?;
    let runs = asked.runs.unwrap_or(if asked.quick { RUNS_QUICKLY } else { RUNS });
    let lanes: usize = cases.iter().map(|case| present(case).count()).sum();
    let progress = progress(lanes as u64 * u64::from(runs + 1));

    let mut outcomes = Vec::new();
    for case in cases {
        let outcome = take_turns(case, runs, asked.miscount, open_files, &progress);
        progress.suspend(|| report::print(&outcome));
        outcomes.push(outcome);
    }
    progress.finish_and_clear();
    goal::print(&outcomes);
    report::print_machine(&machine);
    if let Some(path) = &asked.json {
        std::fs::write(path, report::json(&machine, &outcomes)?)?;
    }
    if let Some(folder) = &asked.pictures {
        std::fs::create_dir_all(folder)?;
        for (file, picture) in page::pictures(&outcomes)? {
            std::fs::write(folder.join(file), picture)?;
        }
    }
    if let Some(path) = &asked.html {
        std::fs::write(path, page::html(&machine, &outcomes)?)?;
    }
    let failed = outcomes.iter().flat_map(|outcome| &outcome.runs).any(|runs| runs.is_err());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The cases and systems that are asked for.
fn chosen(asked: &Measure) -> Result<Vec<Case>> {
    let named = !asked.cases.is_empty();
    // A case that is asked for by name is measured even if it is not one of the quick ones.
    let mut cases = case::cases(asked.quick, asked.scale);
    if named && asked.quick {
        let known: Vec<String> = cases.iter().map(|case| case.name.clone()).collect();
        cases.extend(case::cases(false, asked.scale).into_iter().filter(|case| !known.contains(&case.name)));
    }
    for name in &asked.cases {
        if !cases.iter().any(|case| case.is_called(name)) {
            return Err(format!("there is no case {name}; --list shows them").into());
        }
    }
    for name in &asked.systems {
        if !cases.iter().flat_map(|case| &case.lanes).any(|lane| lane.name == name) {
            return Err(format!("there is no system {name}; --list shows them").into());
        }
    }
    cases.retain(|case| !named || asked.cases.iter().any(|name| case.is_called(name)));
    for case in &mut cases {
        case.lanes.retain(|lane| asked.systems.is_empty() || asked.systems.iter().any(|name| name == lane.name));
    }
    cases.retain(|case| !case.lanes.is_empty());
    Ok(cases)
}

fn present(case: &Case) -> impl Iterator<Item = &Lane> {
    case.lanes.iter().filter(|lane| lane.system.runner.is_some())
}

fn take_turns(mut case: Case, runs: u32, miscount: i64, open_files: u64, progress: &ProgressBar) -> Outcome {
    case.lanes.retain(|lane| lane.system.runner.is_some());
    let mut outcomes: Vec<Runs> = case.lanes.iter().map(|_| Ok(Vec::new())).collect();
    for round in 0..=runs {
        for (lane, outcome) in case.lanes.iter().zip(&mut outcomes) {
            progress.set_message(format!("{}: {}", case.name, lane.name));
            if let Ok(figures) = outcome {
                let wanted = lane.load.connections as u64 + 100;
                let run = if wanted > open_files {
                    Err(format!("needs {wanted} open files, and the system allows {open_files}").into())
                } else {
                    run::run(lane, case.unit, miscount)
                };
                match run {
                    Ok(_) if round == 0 => {}
                    Ok(run) => figures.push(run),
                    Err(error) => *outcome = Err(error.to_string()),
                }
            }
            progress.inc(1);
        }
    }
    Outcome { case, runs: outcomes }
}

/// A bar on standard error, where that is a terminal.
fn progress(runs: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} runs, {eta} left  {msg}");
    let bar = ProgressBar::new(runs).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
