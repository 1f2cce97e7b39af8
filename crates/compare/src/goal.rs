//! What this project has set itself, and how far it got: each goal is checked where the runs it needs were made.

use crate::case::ONE_TASK;
use crate::report::{Outcome, P99, Reading, VALUE};
use crate::sample::Spread;

/// What is asked of `buffstreams`, or of the system that is named.
struct Goal {
    case: &'static str,
    of: &'static str,
    reading: Reading,
    /// Compared with this system, run by run; or as it is.
    to: Option<&'static str>,
    asked: Asked,
}

#[derive(Clone, Copy)]
enum Asked {
    AtLeast(f64),
    AtMost(f64),
}

use Asked::{AtLeast, AtMost};

const OURS: &str = "buffstreams";

const GOALS: &[Goal] = &[
    Goal { case: "p1", of: OURS, reading: VALUE, to: Some("raw"), asked: AtLeast(0.95) },
    Goal { case: "p1", of: OURS, reading: VALUE, to: Some("tokio-codec"), asked: AtLeast(1.4) },
    Goal { case: "p1", of: OURS, reading: VALUE, to: Some("zeromq"), asked: AtLeast(5.0) },
    Goal { case: "p2", of: OURS, reading: VALUE, to: Some("raw"), asked: AtLeast(0.95) },
    Goal { case: "p3", of: OURS, reading: VALUE, to: Some(ONE_TASK), asked: AtLeast(0.8) },
    Goal { case: "p4", of: OURS, reading: VALUE, to: Some("tokio-codec"), asked: AtLeast(2.5) },
    Goal { case: "p5", of: OURS, reading: VALUE, to: Some("raw"), asked: AtLeast(0.95) },
    Goal { case: "p6", of: OURS, reading: VALUE, to: Some("raw"), asked: AtMost(1.1) },
    Goal { case: "p6", of: OURS, reading: P99, to: Some("raw"), asked: AtMost(1.2) },
    Goal { case: "p7", of: OURS, reading: VALUE, to: None, asked: AtMost(2048.0) },
    Goal { case: "p8", of: OURS, reading: VALUE, to: None, asked: AtLeast(10e6) },
    Goal { case: "p8", of: "buffstreams-prost", reading: VALUE, to: None, asked: AtLeast(5e6) },
    Goal { case: "p8", of: OURS, reading: VALUE, to: Some("protosocket"), asked: AtLeast(4.0) },
    Goal { case: "p9", of: "buffstreams-acked", reading: VALUE, to: Some(OURS), asked: AtLeast(0.95) },
    Goal { case: "p10", of: "buffstreams-tls", reading: VALUE, to: Some("raw-tls"), asked: AtLeast(0.9) },
];

/// The goals that can be told of, on standard output.
pub(crate) fn print(outcomes: &[Outcome]) {
    let lines: Vec<String> = GOALS.iter().filter_map(|goal| line(goal, outcomes)).collect();
    if !lines.is_empty() {
        println!("\nGoals (medians of ratios taken run by run)\n{}", lines.join("\n"));
    }
}

fn line(goal: &Goal, outcomes: &[Outcome]) -> Option<String> {
    let outcome = outcomes.iter().find(|outcome| outcome.case.name == goal.case)?;
    let Spread { median, min, max } = match goal.to {
        Some(yardstick) => outcome.ratios(goal.of, yardstick, goal.reading)?,
        None => Spread::of(&outcome.readings(goal.of, goal.reading)?)?,
    };
    let (met, asked) = match goal.asked {
        AtLeast(least) => (median >= least, format!("at least {}", number(least))),
        AtMost(most) => (median <= most, format!("at most {}", number(most))),
    };
    let subject = match goal.to {
        Some(yardstick) => format!("{} / {yardstick}", goal.of),
        None => goal.of.to_owned(),
    };
    let reached = format!("{} ({} .. {})", number(median), number(min), number(max));
    Some(format!("  {:<4} {subject:<34} {asked:<16} {reached:<28} {}", goal.case, if met { "met" } else { "MISSED" }))
}

/// Ratios with decimals, larger figures without.
fn number(value: f64) -> String {
    if value >= 1e6 {
        format!("{:.2} M", value / 1e6)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}
