//! What `top` shows: rows of numbers, and the course of the rates; or the rows alone, as text.
//!
//! Every size of a terminal can be drawn on: where there is no room for the course of a rate its number is a row, a row that
//! is too long takes several lines, and what has no place is told by a sign.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanCount};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Paragraph, RenderDirection, Sparkline, Wrap};

use super::history::History;
use super::scrape::{Role, Sample};

/// The least that rows can be read on.
const LEAST: (u16, u16) = (40, 8);

/// How far the parts of a row stand behind its label, and from each other.
const LABEL: usize = 12;
const GAP: &str = "   ";

/// Stands where more would follow.
const MORE: &str = " …";

/// Lines of a course with its number.
const COURSE: u16 = 3;

/// How a part of a row is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tone {
    Plain,
    /// Nothing that matters.
    Faint,
    Bad,
}

/// One line of numbers that belong together.
struct Row {
    label: &'static str,
    parts: Vec<(String, Tone)>,
}

impl Row {
    fn new(label: &'static str) -> Row {
        Row { label, parts: Vec::new() }
    }

    fn with(mut self, text: impl Into<String>) -> Row {
        self.parts.push((text.into(), Tone::Plain));
        self
    }

    /// A count, told even if it is 0.
    fn count(self, count: u64, what: &str) -> Row {
        self.with(format!("{} {what}", HumanCount(count)))
    }

    /// A count of what should be 0, with its parts.
    fn trouble(mut self, count: u64, what: &str, reasons: &[(&str, u64)]) -> Row {
        let mut text = format!("{} {what}", HumanCount(count));
        if !reasons.is_empty() {
            let parts: Vec<_> = reasons
                .iter()
                .map(|(reason, count)| format!("{} {}", HumanCount(*count), reason.replace('_', " ")))
                .collect();
            text += &format!(" ({})", parts.join(", "));
        }
        self.parts.push((text, if count > 0 { Tone::Bad } else { Tone::Faint }));
        self
    }

    fn some(self, count: u64, what: &str) -> Row {
        if count > 0 { self.count(count, what) } else { self }
    }

    /// As lines of this width, as many as it takes.
    fn wrapped(&self, width: usize, tones: impl Fn(Tone) -> Style) -> Vec<Line<'_>> {
        let begin = |label| Line::from(Span::styled(format!("{label:<LABEL$}"), tones(Tone::Faint)));
        let (mut lines, mut line, mut used) = (Vec::new(), begin(self.label), LABEL);
        for (text, tone) in &self.parts {
            let length = text.chars().count();
            if used > LABEL && used + GAP.len() + length > width {
                lines.push(std::mem::replace(&mut line, begin("")));
                used = LABEL;
            } else if used > LABEL {
                line.push_span(GAP);
                used += GAP.len();
            }
            line.push_span(Span::styled(cut(text, width.saturating_sub(used)), tones(*tone)));
            used += length;
        }
        lines.push(line);
        lines
    }
}

/// What fits into this width, with a sign if that is not all.
fn cut(text: &str, width: usize) -> Cow<'_, str> {
    match text.char_indices().nth(width) {
        None => text.into(),
        Some(_) => text.chars().take(width.saturating_sub(1)).chain(['…']).collect::<String>().into(),
    }
}

/// Rows as lines of this width. If they do not all fit into this height, each is one line, with a sign where more would follow.
fn lines(rows: &[Row], (width, height): (u16, u16), tones: impl Fn(Tone) -> Style) -> Vec<Line<'_>> {
    let (width, height) = (usize::from(width), usize::from(height));
    let lines: Vec<_> = rows.iter().flat_map(|row| row.wrapped(width, &tones)).collect();
    if lines.len() <= height {
        return lines;
    }
    let first = |(index, row): (usize, _)| {
        let mut lines = Row::wrapped(row, width.saturating_sub(MORE.chars().count()), &tones).into_iter();
        let mut first = lines.next().unwrap_or_default();
        if lines.next().is_some() || index + 1 == height && rows.len() > height {
            first.push_span(Span::styled(MORE, tones(Tone::Faint)));
        }
        first
    };
    rows.iter().take(height).enumerate().map(first).collect()
}

/// What there is to tell of one role.
fn rows(sample: &Sample, role: Role) -> Vec<Row> {
    let get = |metric: &str| sample.get(role, metric).unwrap_or_default();
    let trouble = |row: Row, metric: &str, what: &str| row.trouble(get(metric), what, &sample.reasons(role, metric));
    let account = |row: Row| {
        let row = row
            .some(get("messages_recovered_total"), "recovered")
            .count(get("messages_accepted_total"), "accepted")
            .count(get("messages_settled_total"), "settled");
        let row = trouble(row, "messages_failed_total", "failed").some(get("messages_left_total"), "left in the spool");
        let bytes = get("in_flight_bytes");
        row.with(format!("{} in flight ({})", HumanCount(get("messages_in_flight")), BinaryBytes(bytes)))
    };
    let received = |row: Row| {
        let row = row.count(get("messages_received_total"), "received");
        let row = row.with(BinaryBytes(get("received_bytes_total")).to_string());
        trouble(row, "handler_errors_total", "handler errors")
    };
    match role {
        Role::Listener => {
            let row = Row::new("connections").count(get("connections_open"), "open");
            let row = row.count(get("connections_opened_total"), "opened");
            let row = trouble(row, "connections_refused_total", "refused");
            let mut rows = vec![trouble(row, "connections_broken_total", "broken")];
            rows.push(received(Row::new("messages")).some(get("throttled_total"), "pauses for their rate"));
            if get("messages_accepted_total") > 0 {
                rows.push(account(Row::new("replies")));
            }
            rows
        }
        Role::Connection => {
            let row = Row::new("connections").count(get("connections_open"), "open");
            let row = trouble(row, "connections_down", "down");
            let row = trouble(row, "stalled_connections", "stalled");
            let row = row.some(get("connection_losses_total"), "lost");
            let row = row.some(get("connect_failures_total"), "attempts failed");
            let row = row.some(get("streams_resumed_total"), "resumed");
            let row = row.some(get("streams_moved_total"), "moved");
            let refused = get("streams_refused_total");
            let row = if refused > 0 { row.trouble(refused, "refused", &[]) } else { row };
            let mut rows = vec![row, account(Row::new("messages"))];
            rows.push(Row::new("written").with(BinaryBytes(get("written_bytes_total")).to_string()));
            if get("messages_received_total") > 0 {
                rows.push(received(Row::new("replies")));
            }
            if sample.get(role, "spool_capacity_bytes").is_some() {
                let (bytes, capacity) = (get("spool_bytes"), get("spool_capacity_bytes"));
                let kept = get("spool_failed_bytes");
                let row = Row::new("spool").with(format!("{} of {}", BinaryBytes(bytes), BinaryBytes(capacity)));
                let text = format!("{} of failed messages", BinaryBytes(kept));
                rows.push(if kept > 0 {
                    Row { parts: [row.parts, vec![(text, Tone::Bad)]].concat(), ..row }
                } else {
                    row
                });
            }
            rows
        }
    }
}

/// What there is to tell of the process.
fn process(sample: &Sample, processor: Option<f64>) -> Option<Row> {
    let mut row = Row::new("process");
    if let Some(processor) = processor {
        row = row.with(format!("{:.0} % of a core", processor * 100.0));
    }
    if let Some(bytes) = sample.process("resident_memory_bytes") {
        row = row.with(format!("{} of memory", BinaryBytes(bytes as u64)));
    }
    if let Some(descriptors) = sample.process("open_fds") {
        row = row.count(descriptors as u64, "descriptors");
    }
    (!row.parts.is_empty()).then_some(row)
}

fn title(sample: &Sample, role: Role) -> String {
    let what = match role {
        Role::Listener => "receives on",
        Role::Connection => "sends to",
    };
    format!("{what} {}", sample.names(role).join(", "))
}

fn roles(sample: &Sample) -> impl Iterator<Item = Role> {
    [Role::Listener, Role::Connection].into_iter().filter(|role| sample.has(*role))
}

/// The rows as text, for scripts and pipes.
pub(super) fn plain(sample: &Sample) -> String {
    let mut text = String::new();
    let mut put = |row: &Row| {
        for line in row.wrapped(usize::MAX, |_| Style::new()) {
            text += line.to_string().trim_end();
            text.push('\n');
        }
    };
    for role in roles(sample) {
        put(&Row::new(match role {
            Role::Listener => "receives on",
            Role::Connection => "sends to",
        })
        .with(sample.names(role).join(", ")));
        rows(sample, role).iter().for_each(&mut put);
    }
    process(sample, None).iter().for_each(&mut put);
    text
}

/// The screen.
#[derive(Debug)]
pub(super) struct View {
    address: String,
    every: Duration,
    has_colours: bool,
    /// Why the address was not heard of when it was last asked.
    pub(super) failure: Option<String>,
}

impl View {
    pub(super) fn new(address: String, every: Duration, has_colours: bool) -> View {
        View { address, every, has_colours, failure: None }
    }

    fn tone(&self, tone: Tone) -> Style {
        match tone {
            Tone::Plain => Style::new(),
            Tone::Faint => Style::new().add_modifier(Modifier::DIM),
            Tone::Bad => self.colour(Color::Red).add_modifier(Modifier::BOLD),
        }
    }

    fn colour(&self, colour: Color) -> Style {
        if self.has_colours { Style::new().fg(colour) } else { Style::new() }
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>, history: &History) {
        let area = frame.area();
        if area.width < LEAST.0 || area.height < LEAST.1 {
            let text = format!("too small: it takes {} by {}", LEAST.0, LEAST.1);
            return frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
        }
        let failure = self.failure.as_ref().filter(|_| history.last().is_some());
        let heights = [1, u16::from(failure.is_some())].map(Constraint::Length);
        let [head, trouble, body, foot] =
            Layout::vertical([heights[0], heights[1], Constraint::Fill(1), Constraint::Length(1)]).areas(area);
        let name = Span::styled(" buffstreams top ", Style::new().add_modifier(Modifier::BOLD));
        let address = cut(&self.address, usize::from(area.width).saturating_sub(name.width()));
        frame.render_widget(Line::from(vec![name, Span::raw(address)]), head);
        if let Some(failure) = failure {
            let text = format!(" trying on: {failure}");
            frame.render_widget(Line::styled(cut(&text, area.width.into()), self.tone(Tone::Bad)), trouble);
        }
        frame.render_widget(Line::styled(self.foot(history), self.tone(Tone::Faint)), foot);
        match (history.last(), &self.failure) {
            (Some(sample), _) => self.draw_sample(frame, body, sample, history),
            (None, Some(failure)) => {
                let text = Line::styled(format!("{failure}; trying on"), self.tone(Tone::Bad));
                frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }).block(Block::bordered()), body);
            }
            (None, None) => frame.render_widget(Paragraph::new("asking …").block(Block::bordered()), body),
        }
    }

    fn foot(&self, history: &History) -> String {
        let every = humantime::format_duration(self.every);
        match history.age(Instant::now()) {
            Some(age) if age > 2 * self.every => format!(" q quits   of {} s ago", age.as_secs()),
            _ => format!(" q quits   every {every}"),
        }
    }

    fn draw_sample(&self, frame: &mut Frame<'_>, area: Rect, sample: &Sample, history: &History) {
        let process = process(sample, history.processor());
        let shown: Vec<_> = roles(sample).collect();
        let mut places = vec![Constraint::Fill(1); shown.len()];
        places.push(Constraint::Length(u16::from(process.is_some())));
        let areas = Layout::vertical(places).split(area);
        for (role, area) in shown.iter().zip(areas.iter()) {
            self.draw_role(frame, *area, sample, *role, history);
        }
        if let (Some(row), Some(area)) = (process, areas.last()) {
            // In line with the rows above it, which have a frame.
            let area = Rect { x: area.x + 2, width: area.width.saturating_sub(2), ..*area };
            frame.render_widget(Paragraph::new(lines(&[row], (area.width, 1), |tone| self.tone(tone))), area);
        }
    }

    fn draw_role(&self, frame: &mut Frame<'_>, area: Rect, sample: &Sample, role: Role, history: &History) {
        let title = Span::styled(format!(" {} ", title(sample, role)), self.colour(Color::Cyan));
        let block =
            Block::bordered().border_type(BorderType::Rounded).border_style(self.tone(Tone::Faint)).title(title);
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let inner = Rect { x: inner.x + 1, width: inner.width.saturating_sub(2), ..inner };
        let (messages, bytes) = match role {
            Role::Listener => ("messages_received_total", "received_bytes_total"),
            Role::Connection => ("messages_settled_total", "written_bytes_total"),
        };
        let (messages, bytes) = (history.rates(role, messages), history.rates(role, bytes));
        let now = |rates: &VecDeque<u64>| rates.back().copied();
        // Of an address that does not answer it is the last one known.
        let was = if self.failure.is_some() { "was " } else { "" };
        let of_messages = now(messages).map(|rate| format!("{was}{} messages/s", HumanCount(rate)));
        let of_bytes = now(bytes).map(|rate| format!("{was}{}/s", BinaryBytes(rate)));
        let mut rows = rows(sample, role);
        let size = (inner.width, inner.height);
        let height = lines(&rows, (size.0, u16::MAX), |tone| self.tone(tone)).len() as u16;
        let has_courses = inner.height >= height + 1 + COURSE;
        if let (false, Some(messages), Some(bytes)) = (has_courses, &of_messages, &of_bytes) {
            rows.insert(1, Row::new("rate").with(messages).with(bytes));
        }
        frame.render_widget(Paragraph::new(lines(&rows, size, |tone| self.tone(tone))), inner);
        if !has_courses {
            return;
        }
        let below = Rect { y: inner.y + height + 1, height: inner.height - height - 1, ..inner };
        let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).spacing(3).areas(below);
        self.draw_course(frame, left, of_messages, messages, Color::Green);
        self.draw_course(frame, right, of_bytes, bytes, Color::Blue);
    }

    fn draw_course(
        &self,
        frame: &mut Frame<'_>,
        area: Rect,
        now: Option<String>,
        rates: &VecDeque<u64>,
        colour: Color,
    ) {
        let [head, course] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
        let style = match self.failure {
            None => self.tone(Tone::Plain).add_modifier(Modifier::BOLD),
            Some(_) => self.tone(Tone::Faint),
        };
        frame.render_widget(Line::styled(now.unwrap_or_else(|| "…".to_owned()), style), head);
        let latest = rates.iter().rev().take(usize::from(course.width)).copied();
        let sparkline = Sparkline::default().direction(RenderDirection::RightToLeft).style(self.colour(colour));
        frame.render_widget(sparkline.data(latest), course);
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Buffer;

    use super::*;

    /// What a listener and a connection with a spool told, so many seconds after their start.
    fn told(second: u64) -> Sample {
        let (count, bytes) = (1000 * second, 110_000 * second);
        let text = format!(
            r#"# TYPE buffstreams_connections_open gauge
buffstreams_connections_open{{role="listener",name="0.0.0.0:5031"}} 12
buffstreams_connections_open{{role="connection",name="collector:5031"}} 1
# TYPE buffstreams_connections_refused_total counter
buffstreams_connections_refused_total{{role="listener",name="0.0.0.0:5031",reason="too_many"}} 2
buffstreams_connections_refused_total{{role="listener",name="0.0.0.0:5031",reason="not_allowed"}} 5
# TYPE buffstreams_messages_received_total counter
buffstreams_messages_received_total{{role="listener",name="0.0.0.0:5031"}} {count}
buffstreams_received_bytes_total{{role="listener",name="0.0.0.0:5031"}} {bytes}
# TYPE buffstreams_messages_settled_total counter
buffstreams_messages_accepted_total{{role="connection",name="collector:5031"}} {count}
buffstreams_messages_settled_total{{role="connection",name="collector:5031"}} {count}
buffstreams_stalled_connections{{role="connection",name="collector:5031"}} 1
buffstreams_spool_bytes{{role="connection",name="collector:5031"}} 1048576
buffstreams_spool_capacity_bytes{{role="connection",name="collector:5031"}} 1073741824
process_resident_memory_bytes 10485760
process_cpu_seconds_total {second}.5
"#
        );
        Sample::read(&text).unwrap()
    }

    fn history() -> History {
        let mut history = History::default();
        let start = Instant::now();
        (0..20).for_each(|second| history.add(told(second), start + Duration::from_secs(second)));
        history
    }

    fn draw(view: &View, history: &History, width: u16, height: u16) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame, history)).unwrap();
        terminal.backend().buffer().clone()
    }

    fn text(buffer: &Buffer) -> String {
        let area = buffer.area;
        let row = |y| (0..area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..area.height).map(row).collect::<Vec<_>>().join("\n")
    }

    fn view(has_colours: bool) -> View {
        View::new("localhost:9100".to_owned(), Duration::from_secs(1), has_colours)
    }

    #[test]
    fn a_usual_terminal_shows_the_numbers_and_the_course_of_the_rates() {
        let shown = text(&draw(&view(true), &history(), 100, 30));
        for words in [
            "buffstreams top localhost:9100",
            "receives on 0.0.0.0:5031",
            "12 open   0 opened   7 refused (5 not allowed, 2 too many)   0 broken",
            "19,000 received   1.99 MiB   0 handler errors",
            "1,000 messages/s",
            "107.42 KiB/s",
            "████",
            "sends to collector:5031",
            "1 open   0 down   1 stalled",
            "19,000 accepted   19,000 settled   0 failed   0 in flight (0 B)",
            "spool       1.00 MiB of 1.00 GiB",
            "process     100 % of a core   10.00 MiB of memory",
            "q quits   every 1s",
        ] {
            assert!(shown.contains(words), "{words} in:\n{shown}");
        }
    }

    #[test]
    fn every_size_can_be_drawn_on_and_a_small_one_says_so() {
        let history = history();
        for width in 1..=120 {
            for height in [1, 2, 7, 8, 9, 12, 15, 16, 20, 24, 50] {
                draw(&view(true), &history, width, height);
            }
        }
        let small = text(&draw(&view(true), &history, 60, 16));
        assert!(small.contains("rate        1,000 messages/s   107.42 KiB/s"), "{small}");
        let least = text(&draw(&view(true), &history, 40, 8));
        assert!(least.contains("12 open") && least.contains('…'), "{least}");
        let narrow = text(&draw(&view(true), &history, 40, 50));
        // Each in a line of its own, beneath the first.
        for words in
            ["connections 12 open   0 opened", "            7 refused (5 not allowe… │", "            0 broken"]
        {
            assert!(narrow.contains(words), "{words} in:\n{narrow}");
        }
        let too_small = text(&draw(&view(true), &history, 39, 8));
        assert!(too_small.contains("too small: it takes 40 by 8"), "{too_small}");
    }

    #[test]
    fn colours_are_only_where_they_are_wanted() {
        let is_coloured = |buffer: &Buffer| buffer.content().iter().any(|cell| cell.fg != Color::Reset);
        assert!(is_coloured(&draw(&view(true), &history(), 100, 30)));
        assert!(!is_coloured(&draw(&view(false), &history(), 100, 30)));
    }

    #[test]
    fn who_does_not_answer_is_told_and_what_was_known_stays() {
        let mut view = view(true);
        assert!(text(&draw(&view, &History::default(), 80, 24)).contains("asking"));
        view.failure = Some("localhost:9100 cannot be reached: refused".to_owned());
        let nothing = text(&draw(&view, &History::default(), 80, 24));
        assert!(nothing.contains("localhost:9100 cannot be reached: refused; trying on"), "{nothing}");
        let drawn = draw(&view, &history(), 100, 40);
        let known = text(&drawn);
        assert!(known.contains(" trying on: localhost:9100 cannot be reached: refused "), "{known}");
        assert!(known.contains("12 open") && known.contains("was 1,000 messages/s"), "{known}");
        let is_rate = |x, y| drawn[(x, y)].symbol() == "w" && drawn[(x + 1, y)].symbol() == "a";
        let rate = (0..99).flat_map(|x| (0..40).map(move |y| (x, y))).find(|&(x, y)| is_rate(x, y)).unwrap();
        assert!(!drawn[rate].modifier.contains(Modifier::BOLD), "it is not the rate of now");
        let narrow = text(&draw(&view, &history(), 40, 8));
        assert!(narrow.contains(" trying on: localhost:9100 cannot be re…"), "{narrow}");
    }

    #[test]
    fn scripts_get_lines() {
        let lines = plain(&told(19));
        assert!(lines.contains("connections 12 open   0 opened   7 refused (5 not allowed, 2 too many)   0 broken\n"));
        assert!(lines.contains("sends to    collector:5031\n"), "{lines}");
        assert!(lines.lines().all(|line| !line.ends_with(' ')));
    }
}
