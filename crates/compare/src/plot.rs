//! Pictures of figures, as SVG: bars for a case, lines for a curve. Colours are variables of the page, so that one
//! picture serves light and dark.

use std::fmt::Write;

use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::{ChartBuilder, Circle, IntoDrawingArea, IntoFont, LineSeries, SVGBackend};
use plotters::style::{Color, RGBColor, ShapeStyle};

use crate::Result;

const WIDTH: u32 = 760;

/// One system's bar.
pub(crate) struct Bar {
    pub(crate) system: &'static str,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// What stands beside the bar.
    pub(crate) text: String,
}

/// Bars one below the other, longest value at full length; a thin line shows the least and the most of the runs.
pub(crate) fn bars(bars: &[Bar], describes: &str) -> String {
    const HEIGHT: f64 = 20.0;
    const STEP: f64 = 30.0;
    const NAMES: f64 = 168.0;
    const TEXTS: f64 = 190.0;
    let room = f64::from(WIDTH) - NAMES - TEXTS;
    let most = bars.iter().map(|bar| bar.max).fold(f64::MIN_POSITIVE, f64::max);
    let height = STEP * bars.len() as f64;
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#, escape(describes));
    for (index, bar) in bars.iter().enumerate() {
        let top = index as f64 * STEP + (STEP - HEIGHT) / 2.0;
        let middle = top + HEIGHT / 2.0;
        let length = |value: f64| (value / most * room).max(1.0);
        let (low, high) = (NAMES + length(bar.min), NAMES + length(bar.max));
        let _ = write!(
            svg,
            r#"<text class="name" x="{:.0}" y="{middle:.1}" text-anchor="end">{}</text>"#,
            NAMES - 10.0,
            escape(bar.system)
        );
        let _ = write!(
            svg,
            r#"<rect x="{NAMES}" y="{top:.1}" width="{:.1}" height="{HEIGHT}" rx="2" style="fill:var(--{})"/>"#,
            length(bar.median),
            bar.system
        );
        let _ = write!(svg, r#"<path class="range" d="M{low:.1} {middle:.1}H{high:.1}"/>"#);
        let _ =
            write!(svg, r#"<text class="value" x="{:.1}" y="{middle:.1}">{}</text>"#, high + 8.0, escape(&bar.text));
    }
    svg + "</svg>"
}

/// One system's line: where, and how much.
pub(crate) struct Line {
    pub(crate) system: &'static str,
    pub(crate) points: Vec<(f64, f64)>,
}

/// How a curve's axes are divided and named.
pub(crate) struct Axes {
    /// Each mark on the horizontal axis is so many times the one before.
    pub(crate) step: f64,
    pub(crate) across: &'static str,
    pub(crate) up: &'static str,
    pub(crate) across_text: fn(f64) -> String,
    pub(crate) up_text: fn(f64) -> String,
}

/// Lines over a logarithmic axis.
pub(crate) fn curve(lines: &[Line], axes: &Axes, describes: &str) -> Result<String> {
    const HEIGHT: u32 = 360;
    let points = || lines.iter().flat_map(|line| &line.points);
    let least = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.0).fold(f64::MIN_POSITIVE, f64::max);
    let highest = points().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max);

    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let across = (least..most.max(least * 2.0)).log_scale().base(axes.step).zero_point(0.0);
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(48)
            .y_label_area_size(72)
            .build_cartesian_2d(across, 0.0..highest * 1.05)?;
        let font = || ("sans-serif", 13).into_font().color(&INK);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(RGBColor(0, 0, 0).mix(0.0))
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(font())
            .axis_desc_style(font())
            .x_desc(axes.across)
            .y_desc(axes.up)
            .y_labels(6)
            .x_label_formatter(&|value| (axes.across_text)(*value))
            .y_label_formatter(&|value| (axes.up_text)(*value))
            .draw()?;
        for (index, line) in lines.iter().enumerate() {
            let style = ShapeStyle::from(stand_in(index)).stroke_width(2);
            chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
            chart.draw_series(line.points.iter().map(|&point| Circle::new(point, 3, style.filled())))?;
        }
        area.present()?;
    }
    let mut svg = svg.replace("#010203", "currentColor").replace("#040506", "var(--grid)");
    for (index, line) in lines.iter().enumerate() {
        svg = svg.replace(&format!("#0A0B{index:02X}"), &format!("var(--{})", line.system));
    }
    let opening = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#, escape(describes));
    let drawing = svg.split_once("<svg").and_then(|(_, rest)| rest.split_once('>')).map_or("", |(_, drawing)| drawing);
    Ok(opening + drawing)
}

/// A curve as a file of its own: with a legend, and with the colours that the page would lend it.
pub(crate) fn standalone(curve: &str, lines: &[Line], colours: &str) -> String {
    const LEGEND: u32 = 36;
    let (opening, drawing) = curve.split_once('>').unwrap_or_default();
    let height = 360 + LEGEND;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" {}>\n<style>{colours}\nsvg {{ color: \
         var(--ink); font: 13px system-ui, sans-serif; }} text {{ fill: currentColor; }}</style>\n<rect width=\"100%\" \
         height=\"100%\" style=\"fill:var(--paper)\"/>",
        opening.split_once("role").map_or(String::new(), |(_, attributes)| format!("role{attributes}")),
    );
    let mut x = 80;
    for line in lines {
        let _ = write!(
            svg,
            r#"<rect x="{x}" y="14" width="11" height="11" rx="2" style="fill:var(--{0})"/><text x="{1}" y="24">{0}</text>"#,
            line.system,
            x + 17,
        );
        x += 44 + 7 * line.system.len();
    }
    svg + &format!("<g transform=\"translate(0 {LEGEND})\">{}", drawing.trim_end().trim_end_matches("</svg>"))
        + "</g></svg>\n"
}

/// Colours that plotters writes as they are, and that are variables of the page in the end.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);

fn stand_in(index: usize) -> RGBColor {
    RGBColor(10, 11, index as u8)
}

/// Text as HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_the_colours_of_its_systems() {
        let lines = [
            Line { system: "raw", points: vec![(16.0, 1.0), (256.0, 2.0)] },
            Line { system: "buffstreams", points: vec![(16.0, 1.0), (256.0, 2.5)] },
        ];
        let text = |value: f64| format!("{value:.0}");
        let axes = Axes { step: 16.0, across: "bytes", up: "GB/s", across_text: text, up_text: text };
        let svg = curve(&lines, &axes, "a test").unwrap();
        assert!(svg.contains("var(--raw)") && svg.contains("var(--buffstreams)") && svg.contains("currentColor"));
        assert!(!svg.contains("#0A0B") && svg.ends_with("</svg>\n"), "{svg}");

        let file = standalone(&svg, &lines, ":root { --raw: #aaa; }");
        assert!(file.starts_with("<svg xmlns") && file.contains("--raw: #aaa") && file.contains("a test"), "{file}");
        assert_eq!(file.matches("<svg").count(), file.matches("</svg>").count());
    }
}
