//! `buffstreams top`: the numbers of a `--metrics` address, live.
//!
//! Asks once in a while, keeps what it heard in a [`History`](history::History), and draws that. An address that does not
//! answer is told and asked again. Whatever ends it, the terminal is as it was.

mod history;
mod scrape;
mod view;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use crate::args::TopArguments;
use crate::report::Report;
use crate::signals::Signals;
use crate::{Outcome, Status, output};

use history::History;
use view::View;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: TopArguments, report: &Arc<Report>) -> Outcome {
    if arguments.once || !io::stdout().is_terminal() {
        let sample = scrape::scrape(&arguments.address, PATIENCE).await;
        let sample = sample.map_err(|error| {
            format!("{error}; `listen`, `record` and `send` serve their numbers where their --metrics says")
        })?;
        let text = view::plain(&sample);
        return match output::put(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(Status::Success),
        };
    }
    let mut signals = Signals::watch(report)?;
    let mut terminal = ratatui::try_init()?;
    let shown = show(&arguments, &mut terminal, &mut signals).await;
    ratatui::try_restore()?;
    // After a signal its line stays where the prompt comes.
    report.finish();
    shown?;
    Ok(Status::Success)
}

/// Draws until somebody wants no more.
async fn show(
    arguments: &TopArguments,
    terminal: &mut ratatui::DefaultTerminal,
    signals: &mut Signals,
) -> io::Result<()> {
    let mut keys = keys()?;
    let mut view = View::new(arguments.address.to_string(), arguments.every, has_colours());
    let mut history = History::default();
    let mut clock = tokio::time::interval(arguments.every);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        terminal.draw(|frame| view.draw(frame, &history))?;
        tokio::select! {
            wish = keys.recv() => match wish {
                Some(Wish::Redraw) => {}
                Some(Wish::End) | None => return Ok(()),
            },
            () = signals.first() => return Ok(()),
            scraped = async {
                clock.tick().await;
                scrape::scrape(&arguments.address, PATIENCE).await
            } => match scraped {
                Ok(sample) => {
                    view.failure = None;
                    history.add(sample, Instant::now());
                }
                Err(error) => view.failure = Some(error.to_string()),
            },
        }
    }
}

enum Wish {
    Redraw,
    End,
}

/// What comes from the keyboard, read by a thread of its own, which may block for ever.
fn keys() -> io::Result<mpsc::Receiver<Wish>> {
    let (sender, receiver) = mpsc::channel(8);
    let read = move || {
        while let Ok(event) = event::read() {
            let wish = match event {
                Event::Key(key) if key.kind != KeyEventKind::Press => continue,
                Event::Key(key) => match key.code {
                    KeyCode::Char('q' | 'Q') | KeyCode::Esc => Wish::End,
                    KeyCode::Char('c' | 'd') if key.modifiers.contains(KeyModifiers::CONTROL) => Wish::End,
                    _ => continue,
                },
                Event::Resize(..) => Wish::Redraw,
                _ => continue,
            };
            if sender.blocking_send(wish).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(read)?;
    Ok(receiver)
}

/// <https://no-color.org>
fn has_colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
