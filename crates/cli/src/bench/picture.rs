//! What was measured as a picture: latency against percentile, and the rate over time; and as a page around it.
//!
//! The picture needs nothing else, and has its colours for day and night with it, so that it is the same alone and in the
//! page.

use std::error::Error;
use std::fmt::Write;

use hdrhistogram::Histogram;
use plotters::coord::Shift;
use plotters::prelude::{
    AreaSeries, ChartBuilder, DrawingArea, IntoDrawingArea, IntoFont, IntoLogRange, LineSeries, SVGBackend,
};
use plotters::style::{Color, RGBColor, ShapeStyle};

use super::arguments::By;
use super::measured::Measured;
use super::table::{notes, setting, table, time};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 760;
const CURVE_HEIGHT: u32 = 340;
const RATE_HEIGHT: u32 = 240;

/// Points of the curve between 90 % and 99 %, and in each such step.
const POINTS: u32 = 40;

/// Colours that plotters writes as they are, and that are variables in the end.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);
const LINE: RGBColor = RGBColor(7, 8, 9);
const SOFT: RGBColor = RGBColor(10, 11, 12);
const VARIABLES: [(RGBColor, &str); 4] =
    [(INK, "var(--ink)"), (GRID, "var(--grid)"), (LINE, "var(--line)"), (SOFT, "var(--soft)")];

const STYLE: &str = r#"
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1b1d1f; --soft: #9aa1a8; --grid: #d9dcdf; --line: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e8eaec; --soft: #6d767f; --grid: #343a40; --line: #4c9bf5; }
}
"#;

/// The picture.
pub(crate) fn svg(measured: &Measured) -> Result<String> {
    let latency = measured.latency.as_ref().zip(measured.late.as_ref()).filter(|(latency, _)| !latency.is_empty());
    let height = RATE_HEIGHT + if latency.is_some() { CURVE_HEIGHT } else { 0 };
    let mut drawn = String::new();
    {
        let whole = SVGBackend::with_string(&mut drawn, (WIDTH, height)).into_drawing_area();
        let below = match latency {
            Some((latency, late)) => {
                let (above, below) = whole.split_vertically(CURVE_HEIGHT);
                percentiles(&above, latency, late)?;
                below
            }
            None => whole.clone(),
        };
        rate_over_time(&below, measured)?;
        whole.present()?;
    }
    for (RGBColor(red, green, blue), variable) in VARIABLES {
        drawn = drawn.replace(&format!("#{red:02X}{green:02X}{blue:02X}"), variable);
    }
    // In attributes variables are not looked up; in a style they are.
    for attribute in ["fill", "stroke"] {
        drawn = drawn.replace(&format!("{attribute}=\"var("), &format!("style=\"{attribute}:var("));
    }
    let (_, drawing) = drawn.split_once("<svg").and_then(|(_, rest)| rest.split_once('>')).unwrap_or_default();
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"{}\">\n<style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\" \
         style=\"fill:var(--paper)\"/>{drawing}",
        escape(&setting(measured))
    ))
}

/// Latency against percentile, where 90, 99 and 99.9 % are equally far apart, over logarithmic time.
fn percentiles(area: &Area<'_>, latency: &Histogram<u64>, late: &Histogram<u64>) -> Result<()> {
    // One in so many messages took longer.
    let most = (latency.len() as f64).clamp(10.0, 1e6);
    let curve = |histogram: &Histogram<u64>| {
        let steps = (most.log10() * f64::from(POINTS)).ceil() as u32;
        let points = (0..=steps).map(|step| 10_f64.powf(f64::from(step) / f64::from(POINTS)).min(most));
        let point = |one_in: f64| (one_in, histogram.value_at_quantile(1.0 - 1.0 / one_in).max(1) as f64);
        points.map(point).collect::<Vec<_>>()
    };
    let (latency, late) = (curve(latency), curve(late));
    let values = || latency.iter().chain(&late).map(|point| point.1);
    let least = values().fold(f64::INFINITY, f64::min).max(1e3);
    let highest = values().fold(1e4, f64::max);
    let decade = |value: f64, round: fn(f64) -> f64| 10_f64.powf(round(value.log10()));
    let across = (1.0..most).log_scale();
    let up = (decade(least, f64::floor)..decade(highest, f64::ceil)).log_scale();
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(28)
        .caption("Latency by percentile", ("sans-serif", 15).into_font().color(&INK))
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(across, up)?;
    let font = || ("sans-serif", 13).into_font().color(&INK);
    chart
        .configure_mesh()
        .light_line_style(GRID.mix(0.0))
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(font())
        .axis_desc_style(font())
        .x_desc("of all messages, so many took no longer")
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|one_in| percentile(*one_in))
        .y_label_formatter(&|ns| time(*ns).replace(".00", "").replace(".0", ""))
        .draw()?;
    for (points, colour, width) in [(late, SOFT, 1), (latency, LINE, 2)] {
        chart.draw_series(LineSeries::new(points, ShapeStyle::from(colour).stroke_width(width)))?;
    }
    Ok(())
}

/// 1 is 0 %, 10 is 90 %, 100 is 99 %.
fn percentile(one_in: f64) -> String {
    let nines = one_in.log10().round().max(0.0) as usize;
    match nines {
        0 => "0 %".to_owned(),
        _ => format!("{:.*} %", nines.saturating_sub(2), 100.0 - 100.0 / 10_f64.powi(nines as i32)),
    }
}

fn rate_over_time(area: &Area<'_>, measured: &Measured) -> Result<()> {
    let part = measured.part.as_secs_f64();
    let points: Vec<(f64, f64)> = (0_u32..)
        .zip(&measured.parts)
        .flat_map(|(index, (messages, _))| {
            let rate = *messages as f64 / part;
            [(f64::from(index) * part, rate), (f64::from(index + 1) * part, rate)]
        })
        .collect();
    let highest = points.iter().map(|point| point.1).chain(measured.asked).fold(1.0, f64::max);
    let end = measured.time.as_secs_f64().max(part);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(28)
        .caption("Answers a second", ("sans-serif", 15).into_font().color(&INK))
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..end, 0.0..highest * 1.08)?;
    let font = || ("sans-serif", 13).into_font().color(&INK);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(GRID.mix(0.0))
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(font())
        .axis_desc_style(font())
        .x_desc("seconds since the end of the warm-up")
        .y_labels(5)
        .x_label_formatter(&|seconds| number(*seconds))
        .y_label_formatter(&|rate| match *rate {
            rate if rate >= 1e6 => format!("{} M", number(rate / 1e6)),
            rate if rate >= 1e4 => format!("{} k", number(rate / 1e3)),
            rate => number(rate),
        })
        .draw()?;
    if let Some(asked) = measured.asked {
        chart.draw_series(LineSeries::new([(0.0, asked), (end, asked)], ShapeStyle::from(SOFT).stroke_width(1)))?;
    }
    chart.draw_series(AreaSeries::new(points.iter().copied(), 0.0, LINE.mix(0.18)))?;
    chart.draw_series(LineSeries::new(points, ShapeStyle::from(LINE).stroke_width(2)))?;
    Ok(())
}

/// Without zeros that say nothing.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The picture and the table as a page that needs nothing else.
pub(crate) fn html(measured: &Measured, picture: &str) -> String {
    let mut page = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"/>\n<title>buffstreams bench</title>\n<style>",
    );
    page.push_str(STYLE);
    page.push_str(
        "body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }\n\
         main { max-width: 780px; margin: 0 auto; padding: 32px 20px 64px; }\nh1 { font-size: 1.6rem; margin: 0 0 \
         .4rem; }\nsvg { display: block; width: 100%; height: auto; }\npre { overflow-x: auto; font-size: .85rem; \
         line-height: 1.5; }\n.note { font-size: .9rem; }\n</style></head>\n<body><main><h1>buffstreams bench</h1>\n",
    );
    let mut line = |text: &str| writeln!(page, "{text}").expect("a String takes everything");
    line(&format!("<p>{}</p>", escape(&setting(measured))));
    line(picture);
    if measured.latency.is_some() {
        let answer = if measured.by == By::Acks { "acknowledgement" } else { "answer" };
        line(&format!(
            "<p class=\"note\">Blue: from when a message was due to its {answer}. Grey above: by how much it was sent \
             late, which is part of it. Grey below: the rate that was asked for.</p>"
        ));
    }
    line(&format!("<pre>{}</pre>", escape(&table(measured))));
    for note in notes(measured) {
        line(&format!("<p class=\"note\">{}</p>", escape(&note)));
    }
    line("</main></body></html>");
    page
}

/// Text as XML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_of_the_axis_is_one_more_nine() {
        let percentiles = [1.0, 10.0, 100.0, 1e3, 1e4].map(percentile);
        assert_eq!(percentiles, ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
    }
}
