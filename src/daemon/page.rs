//! The page that a browser shows: all of a status, and how it went. HTML alone, which the browser asks for again every few seconds.
//!
//! Every name and message is hostile: nothing gets into the page but through `Html`.

use std::fmt::{Display, Write as _};

use chrono::{DateTime, SecondsFormat};
use indicatif::{BinaryBytes, HumanCount};

use super::samples::{History, Point, Series};
use super::status::{JobStatus, Progress, Publication, Status, TargetStatus};
use super::words::{self, Level, age, attention, level, span};
use crate::error::{Escaped, counted, said};

const STYLE: &str = include_str!("page.css");
/// Seconds until the browser asks again.
const REFRESH: u64 = 5;
/// So many troubles are told in full above everything, so that the tables are still on the first screen; all of them stand there.
const ALERTS: usize = 4;
const RECENT: usize = 30;

/// Text in HTML, within an element or a quoted attribute. Control characters and marks that reorder text are shown as such.
struct Html<T>(T);

impl<T: AsRef<str>> Display for Html<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.as_ref().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                // What was escaped once stays as it is.
                '\\' => f.write_str("\\")?,
                c => write!(f, "{}", Escaped(c.encode_utf8(&mut [0; 4]).as_bytes()))?,
            }
        }
        Ok(())
    }
}

/// The whole page.
pub fn render(status: &Status, history: &History) -> String {
    let mut page = Page { text: String::with_capacity(64 * 1024), now: status.now };
    page.head(status);
    page.counts(status);
    page.alerts(status);
    for job in &status.jobs {
        page.job(job, history);
    }
    if status.jobs.is_empty() {
        page.put(format_args!(
            "<section class=\"alert working\"><h2>No job runs</h2><p>The daemon starts or ends, or its configuration has no \
             [[job]].</p></section>\n"
        ));
    }
    page.recent(&status.recent);
    page.put(format_args!(
        "<footer>Asked for again every {REFRESH} seconds. <a href=\"/status.json\">status.json</a> · \
         <a href=\"/metrics\">metrics</a> · in a terminal: lockstep status</footer>\n</body>\n</html>\n"
    ));
    page.text
}

struct Page {
    text: String,
    now: u64,
}

impl Page {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String never fails.
        let _ = self.text.write_fmt(text);
    }

    fn head(&mut self, status: &Status) {
        let bad: usize = words::counts(status).iter().filter(|(level, _)| level.is_bad()).map(|(_, count)| count).sum();
        let bad = if bad > 0 { format!("({bad}) ") } else { String::new() };
        let host = Html(words::name(&status.host));
        self.put(format_args!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{bad}lockstep on {host}</title>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"refresh\" content=\"{REFRESH}\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
             <header><h1>lockstep on {host}</h1><p class=\"muted\">version {}, running for {}, process {}, {}, as of {}</p>\
             </header>\n",
            Html(&status.version),
            span(status.now.saturating_sub(status.started)),
            status.pid,
            Html(said(status.config.as_bytes())),
            clock(status.now),
        ));
    }

    fn counts(&mut self, status: &Status) {
        self.put(format_args!("<ul class=\"counts\">"));
        for (level, count) in words::counts(status) {
            let class = class(level);
            self.put(format_args!("<li class=\"{class}\"><b>{count}</b><span>{}</span></li>", level.name()));
        }
        self.put(format_args!("</ul>\n"));
    }

    fn alerts(&mut self, status: &Status) {
        let all = attention(status);
        for one in all.iter().take(ALERTS) {
            let (class, word) = (class(one.level), one.level.name());
            let about = match (&one.job, &one.target) {
                (Some(job), Some(target)) => format!("{} <span class=\"muted\">to</span> {}", Html(job), Html(target)),
                (Some(job), None) => Html(job).to_string(),
                _ => "configuration".to_owned(),
            };
            let mark = mark(one.level);
            self.put(format_args!(
                "<section class=\"alert {class}\"><h2><span class=\"state\"><i>{mark}</i>{word}</span> {about}</h2>"
            ));
            if let Some(behind) = &one.behind {
                self.put(format_args!("<p class=\"muted\">{}</p>", Html(behind)));
            }
            self.put(format_args!("<p>{}</p>", Html(&one.why)));
            if let Some(hint) = &one.hint {
                self.put(format_args!("<p class=\"todo\">{}</p>", Html(hint)));
            }
            if let Some(next) = &one.next {
                self.put(format_args!("<p class=\"muted\">{}</p>", Html(next)));
            }
            self.put(format_args!("</section>\n"));
        }
        if let Some(more) = all.len().checked_sub(ALERTS).filter(|&more| more > 0) {
            let targets = counted(more as u64, "more trouble stands", "more troubles stand");
            self.put(format_args!(
                "<section class=\"alert failing\"><p>{targets} in the tables below.</p></section>\n"
            ));
        }
    }

    fn job(&mut self, job: &JobStatus, history: &History) {
        self.put(format_args!(
            "<section><div class=\"top\"><h2>{}</h2><span class=\"muted clamp\">{}</span>",
            Html(words::name(&job.name)),
            Html(said(job.source.as_bytes()))
        ));
        if job.paused {
            self.put(format_args!("<span class=\"state paused\"><i>{}</i>paused</span>", mark(Level::Paused)));
        }
        self.put(format_args!("<span class=\"muted\">{}</span>", Html(watching(job, self.now))));
        if job.unfinished_count > 0 {
            self.put(format_args!("<span class=\"muted clamp\">{}</span>", Html(unfinished(job))));
        }
        self.put(format_args!("</div>\n<table class=\"targets\"><thead><tr>"));
        let shown = job.targets.first().map(|target| history.series(&job.name, &target.target)).unwrap_or_default();
        let of = if shown.span_seconds == 0 { String::new() } else { format!(", {}", span(shown.span_seconds)) };
        for title in ["State", "Target", "Behind", "Now", "Last success", &format!("Lag{of}"), &format!("Rate{of}")] {
            self.put(format_args!("<th>{title}</th>"));
        }
        self.put(format_args!("</tr></thead><tbody>\n"));
        let mut targets: Vec<_> = job.targets.iter().map(|target| (level(job, target), target)).collect();
        // What is wrong comes first. The rest stays where the configuration has it, so that no row jumps about.
        targets.sort_by_key(|&(level, _)| if level.is_bad() { level } else { Level::InStep });
        for (level, target) in targets {
            self.target(level, target, &history.series(&job.name, &target.target));
        }
        self.put(format_args!("</tbody></table></section>\n"));
    }

    fn target(&mut self, level: Level, target: &TargetStatus, series: &Series) {
        let (class, mark) = (class(level), mark(level));
        // While something goes on, what it is says more.
        let word =
            if level == Level::Working && target.progress.is_some() { target.state.name() } else { level.name() };
        self.put(format_args!(
            "<tr class=\"{class}\"><td class=\"where\"><span class=\"state\"><i>{mark}</i>{word}</span></td><td class=\"target\">{}",
            Html(words::name(&target.target))
        ));
        if let Some(error) = &target.last_error {
            let times = if error.times > 1 { format!(", {} times", error.times) } else { String::new() };
            let message = Html(said(error.message.as_bytes()));
            self.put(format_args!(
                "<div class=\"error clamp\" title=\"{message}\">{message}</div><small class=\"error\">{}{times}</small>",
                age(self.now, error.time)
            ));
        }
        self.put(format_args!("</td>"));
        match words::behind(target) {
            Some(behind) => {
                let behind = behind.strip_prefix("behind ").map_or(behind.as_str(), |rest| rest);
                let behind = behind.strip_prefix("by ").unwrap_or(behind);
                self.put(format_args!("<td data-label=\"Behind\">{}</td><td class=\"now\">", Html(behind)));
            }
            None => self.put(format_args!("<td></td><td class=\"now\">")),
        }
        match (&target.progress, target.next_try) {
            (Some(progress), _) => self.progress(target, progress),
            (None, Some(next)) => {
                let seconds = next.saturating_sub(self.now);
                self.put(format_args!("<span class=\"muted\">tried again in {}</span>", span(seconds)));
            }
            (None, None) => {}
        }
        let success =
            target.last_success.map_or_else(|| "<span class=\"muted\">never</span>".into(), |at| self.ago(at));
        let title = target.generation.map_or_else(String::new, |number| format!(" title=\"generation {number}\""));
        self.put(format_args!("</td><td data-label=\"Last success\"{title}>{success}</td>"));
        self.plot("lag", "Lag", series, |point| point.lag_seconds, &|most| words::short(most));
        self.plot("rate", "Rate", series, |point| point.bytes_per_second, &|most| format!("{}/s", BinaryBytes(most)));
        self.put(format_args!("</tr>\n"));
    }

    fn progress(&mut self, target: &TargetStatus, progress: &Progress) {
        if progress.total_bytes == 0 {
            let state = target.state.name();
            return self.put(format_args!("<span class=\"muted\">{state} for {}</span>", span(progress.seconds)));
        }
        let share = progress.done_bytes.min(progress.total_bytes) as f64 / progress.total_bytes as f64 * 100.0;
        self.put(format_args!(
            "<div class=\"bar\"><div style=\"width:{share:.1}%\"></div></div>{share:.0}% <small>of {}, {} of {} files, {}/s</small>",
            BinaryBytes(progress.total_bytes),
            HumanCount(progress.done_files),
            HumanCount(progress.total_files),
            BinaryBytes(progress.bytes_per_second),
        ));
    }

    /// A small plot with the largest value in words.
    fn plot(
        &mut self,
        class: &str,
        label: &str,
        series: &Series,
        value: impl Fn(&Point) -> u64,
        words: &dyn Fn(u64) -> String,
    ) {
        let most = series.points.iter().map(&value).max().unwrap_or(0);
        if most == 0 {
            return self.put(format_args!("<td class=\"plot idle\">{EMPTY_PLOT}</td>"));
        }
        let most_words = words(most);
        self.put(format_args!(
            "<td class=\"plot\" data-label=\"{label}\"><div><svg class=\"{class}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             preserveAspectRatio=\"none\" role=\"img\"><title>{label} of the last {}, max {most_words}</title>\
             <path class=\"base\" d=\"M0 {HEIGHT}H{WIDTH}\"/>",
            span(series.span_seconds)
        ));
        let (line, area) = curve(series, self.now, most, value);
        self.put(format_args!(
            "<path class=\"area\" d=\"{area}\"/><path class=\"line\" d=\"{line}\"/></svg><small>max {most_words}</small></div></td>"
        ));
    }

    fn recent(&mut self, recent: &[Publication]) {
        if recent.is_empty() {
            return;
        }
        self.put(format_args!(
            "<section><div class=\"top\"><h2>Published last</h2><span class=\"muted\">all of it: lockstep history</span></div>\n\
             <table class=\"recent\"><tbody>\n"
        ));
        for one in recent.iter().take(RECENT) {
            let when = self.ago(one.time);
            let class = class(if one.error.is_some() { Level::Failing } else { Level::InStep });
            self.put(format_args!(
                "<tr class=\"{class}\"><td class=\"muted\">{when}</td><td>{} <span class=\"muted\">to</span> {}</td><td>",
                Html(words::name(&one.job)),
                Html(words::name(&one.target))
            ));
            match &one.error {
                Some(error) => self.put(format_args!("<span class=\"error\">{}</span>", Html(said(error.as_bytes())))),
                None => self.put(format_args!("{}", published(one))),
            }
            self.put(format_args!("</td></tr>\n"));
        }
        self.put(format_args!("</tbody></table></section>\n"));
    }

    /// How long ago, with the time itself for who points at it.
    fn ago(&self, time: u64) -> String {
        let at = clock(time);
        format!("<time datetime=\"{at}\" title=\"{at}\">{}</time>", age(self.now, time))
    }
}

const WIDTH: u64 = 180;
const HEIGHT: u64 = 34;
const EMPTY_PLOT: &str = "<svg viewBox=\"0 0 180 34\" preserveAspectRatio=\"none\" aria-hidden=\"true\"><path class=\"base\" d=\"M0 34H180\"/></svg>";

/// The line and what is below it, as paths of SVG. Where the daemon did not run there is a gap.
fn curve(series: &Series, now: u64, most: u64, value: impl Fn(&Point) -> u64) -> (String, String) {
    let begin = now.saturating_sub(series.span_seconds);
    let across = |time: u64| {
        time.saturating_sub(begin).min(series.span_seconds) as f64 / series.span_seconds.max(1) as f64 * WIDTH as f64
    };
    let up = |value: u64| HEIGHT as f64 * (1.0 - 0.94 * value as f64 / most.max(1) as f64);
    let (mut line, mut area) = (String::new(), String::new());
    let mut before: Option<&Point> = None;
    for point in &series.points {
        let (x, y) = (across(point.time), up(value(point)));
        match before.filter(|before| point.time - before.time <= 2 * series.step_seconds) {
            Some(_) => {
                let _ = write!(line, "L{x:.1} {y:.1}");
                let _ = write!(area, "L{x:.1} {y:.1}");
            }
            None => {
                if let Some(before) = before {
                    let _ = write!(area, "V{HEIGHT}Z");
                    // A point alone is a dash, so that it is seen.
                    let _ = write!(line, "L{:.1} {:.1}", across(before.time) + 0.5, up(value(before)));
                }
                let _ = write!(line, "M{x:.1} {y:.1}");
                let _ = write!(area, "M{x:.1} {HEIGHT}V{y:.1}");
            }
        }
        before = Some(point);
    }
    if let Some(last) = before {
        // Up to now it is as it was when it was looked at last.
        let _ = write!(line, "H{:.1}", across(now).max(across(last.time) + 0.5));
        let _ = write!(area, "H{:.1}V{HEIGHT}Z", across(now).max(across(last.time) + 0.5));
    }
    (line, area)
}

fn clock(time: u64) -> String {
    let time = i64::try_from(time).ok().and_then(|time| DateTime::from_timestamp(time, 0)).unwrap_or_default();
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn class(level: Level) -> &'static str {
    match level {
        Level::InStep => "in-step",
        other => other.name(),
    }
}

/// The state by its shape, for whoever does not see the colour.
fn mark(level: Level) -> &'static str {
    match level {
        Level::Halted => "■",
        Level::Failing => "▲",
        Level::Paused => "‖",
        Level::Working => "◆",
        Level::InStep => "●",
    }
}

fn watching(job: &JobStatus, now: u64) -> String {
    let watching = &job.watching;
    let mut text = match watching.mode.as_str() {
        "events" => format!("watches {}", counted(watching.directories, "directory", "directories")),
        mode => mode.to_owned(),
    };
    if let Some(why) = &watching.why {
        let _ = write!(text, " ({})", said(why.as_bytes()));
    }
    if let Some(scan) = watching.last_scan {
        let _ = write!(text, ", looked at as a whole {}", age(now, scan));
    }
    for path in &watching.unmounted {
        let _ = write!(text, ", '{}' is not mounted", said(path.as_bytes()));
    }
    text
}

fn unfinished(job: &JobStatus) -> String {
    let some: Vec<String> = job.unfinished.iter().take(3).map(|name| said(name.as_bytes())).collect();
    let more = if job.unfinished_count as usize > some.len() { ", …" } else { "" };
    format!("{} not finished at the source: {}{more}", HumanCount(job.unfinished_count), some.join(", "))
}

fn published(one: &Publication) -> String {
    let seconds = one.milliseconds as f64 / 1000.0;
    let mut text = format!("{}, {} in {seconds:.1} s", counted(one.files, "path", "paths"), BinaryBytes(one.bytes));
    if let Some(generation) = one.generation {
        let _ = write!(text, " <small>generation {generation}</small>");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text() {
        let text = "<script>alert('1')</script> & \"\u{202e}\u{0}\n\\n";
        let shown = "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;\\xe2\\x80\\xae\\x00\\n\\n";
        assert_eq!(Html(text).to_string(), shown);
    }

    #[test]
    fn a_curve_has_gaps_where_nothing_is_known() {
        let point = |time, lag_seconds| Point { time, lag_seconds, ..Point::default() };
        let points = vec![point(100, 0), point(110, 5), point(500, 10)];
        let series = Series { span_seconds: 900, step_seconds: 10, points };
        let (line, area) = curve(&series, 910, 10, |point| point.lag_seconds);
        assert_eq!(line.matches('M').count(), 2, "{line}");
        assert_eq!(area.matches('Z').count(), 2, "{area}");
        assert!(!line.contains("NaN") && !area.contains("NaN"));
    }
}
