//! What people read: tables, marks, times.

use std::{
    io::{IsTerminal, Write as _},
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets::NOTHING};
use serde::Serialize;

use crate::args::Output;

/// Exit status for "nothing is known": neither a yes nor a no, and no error of this program.
pub(crate) const NOTHING_KNOWN: u8 = 4;

/// `println!` for people who pipe us into `head`: a reader that has gone ends the program quietly.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::write_line(format_args!($($text)*)) };
}
pub(crate) use say;

pub(crate) fn write_line(text: std::fmt::Arguments<'_>) {
    if let Err(error) = writeln!(std::io::stdout(), "{text}") {
        // 141 is what a shell shows for a program that SIGPIPE ended.
        std::process::exit(if error.kind() == std::io::ErrorKind::BrokenPipe { 141 } else { 1 });
    }
}

impl Output {
    /// A document for programs, or what people read.
    pub(crate) fn render(self, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<String> {
        Ok(match self {
            Self::Json => serde_json::to_string_pretty(value)?,
            Self::Text => text(),
            Self::Yaml => yaml(value)?,
        })
    }
}

pub(crate) fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_saphyr::to_string(value)?.trim_end().to_owned())
}

/// A plain table: headings, no lines, as wide as the terminal.
pub(crate) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(headings.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table
}

/// How wide columns may become.
pub(crate) fn bound(table: &mut Table, widths: &[(usize, u16)]) {
    for (column, width) in widths {
        if let Some(column) = table.column_mut(*column) {
            column.set_constraint(ColumnConstraint::UpperBoundary(Width::Fixed(*width)));
        }
    }
}

/// Coloured only where someone looks (a terminal, and no `NO_COLOR`).
pub(crate) fn good(text: &str) -> String {
    paint(AnsiColor::Green, text)
}

pub(crate) fn bad(text: &str) -> String {
    paint(AnsiColor::Red, text)
}

pub(crate) fn dim(text: &str) -> String {
    if colours() {
        format!("{}{text}{}", Style::new().dimmed().render(), Style::new().dimmed().render_reset())
    } else {
        text.to_owned()
    }
}

fn paint(colour: AnsiColor, text: &str) -> String {
    let style = Style::new().fg_color(Some(colour.into()));
    if colours() { format!("{}{text}{}", style.render(), style.render_reset()) } else { text.to_owned() }
}

fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// `demo/web` of `web.demo.svc.cluster.local`, also where `demo/` is written before it; other services stay whole.
pub(crate) fn short_name(service: &str) -> String {
    let (said, host) = service.split_once('/').map_or((None, service), |(namespace, host)| (Some(namespace), host));
    match host.split_once(".svc.").and_then(|(short, _)| short.split_once('.')) {
        Some((name, namespace)) if said.is_none_or(|said| said == namespace) && !namespace.contains('.') => {
            format!("{namespace}/{name}")
        }
        _ => service.to_owned(),
    }
}

/// `12 ms`, `1.3 s`.
pub(crate) fn took(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// `1.2 ms`, `340 µs`.
pub(crate) fn microseconds(us: u64) -> String {
    if us < 1000 { format!("{us} µs") } else { format!("{:.1} ms", us as f64 / 1000.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_of_kubernetes_have_a_short_name_and_others_none() {
        assert_eq!(short_name("web.demo.svc.cluster.local"), "demo/web");
        assert_eq!(short_name("demo/web.demo.svc.cluster.local"), "demo/web");
        for whole in ["demo/web.other.svc.cluster.local", "demo/api.example.com", "api.example.com", "a.b.c.svc.d", ""]
        {
            assert_eq!(short_name(whole), whole);
        }
    }
}
