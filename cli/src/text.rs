//! What is printed: escaping, tables, JSON, times.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::Serialize;

use crate::exit::Failure;

/// Whether a terminal could be deceived by the character: C0, DEL, C1, line separators, invisible and bidirectional controls.
fn unsafe_char(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn escape(text: &str, keep: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if keep.contains(&c) || !unsafe_char(c) => escaped.push(c),
            c if u32::from(c) < 0x100 => _ = write!(escaped, "\\x{:02x}", u32::from(c)),
            c => _ = write!(escaped, "\\u{{{:x}}}", u32::from(c)),
        }
    }
    escaped
}

/// One line of foreign text, safe for a terminal.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    if text.chars().any(unsafe_char) { Cow::Owned(escape(text, &[])) } else { Cow::Borrowed(text) }
}

/// Foreign text of several lines, safe for a terminal; newlines and tabs stay.
pub(crate) fn lines(text: &str) -> String {
    escape(text, &['\n', '\t'])
}

/// Foreign text of several lines whose later lines are indented, so that none can pass for a line of ours.
pub(crate) fn indented(text: &str, width: usize) -> String {
    lines(text.trim_end()).replace('\n', &format!("\n{:width$}", ""))
}

/// Prints to standard output.
pub(crate) fn out(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| Failure::output(&error))
}

/// Prints a line to standard error. Nobody can be told when that fails.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A value as one line of JSON. Characters that could deceive a terminal become `\uXXXX`, which means the same.
pub(crate) fn to_json(value: &impl Serialize) -> Result<String, Failure> {
    let json = serde_json::to_string(value)
        .map_err(|error| Failure::new(crate::exit::Exit::Failure, format!("cannot write JSON: {error}")))?;
    let mut safe = String::with_capacity(json.len() + 1);
    for c in json.chars() {
        if unsafe_char(c) {
            _ = write!(safe, "\\u{:04x}", u32::from(c));
        } else {
            safe.push(c);
        }
    }
    safe.push('\n');
    Ok(safe)
}

/// Prints a value as one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    out(&to_json(value)?)
}

/// A table with a heading; the cells are foreign text, the last column is not padded.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut cells: Vec<Vec<String>> = vec![heading.iter().map(|&cell| cell.to_owned()).collect()];
    cells.extend(rows.iter().map(|row| row.iter().map(|cell| line(cell).into_owned()).collect()));
    let widths: Vec<usize> = (0..heading.len())
        .map(|column| {
            cells.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut table = String::new();
    for row in cells {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            _ = write!(text, "{cell:width$}  ");
        }
        table.push_str(text.trim_end());
        table.push('\n');
    }
    table
}

/// A time as RFC 3339 in UTC with milliseconds, from microseconds since 1970-01-01 UTC.
pub(crate) fn time(micros: u64) -> String {
    let seconds = micros / 1_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    let of_day = seconds % 86_400;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", micros / 1000 % 1000)
}

/// The date of a day since 1970-01-01 (H. Hinnant, `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// A span for people, from seconds.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut unit = 0;
    let mut tenths = u128::from(count) * 10 / 1024;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS.get(unit).unwrap_or(&"PiB"))
}

/// Now, in microseconds since 1970-01-01 UTC.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn terminal_sequences_are_escaped() {
        assert_eq!(line("plain ünï"), "plain ünï");
        assert_eq!(line("a\x1b]0;x\x07\r\n\u{9b}2J\u{202e}"), "a\\x1b]0;x\\x07\\x0d\\x0a\\x9b2J\\u{202e}");
        assert_eq!(lines("a\n\tb\r\x1b["), "a\n\tb\\x0d\\x1b[");
        assert_eq!(indented("a\nb\n", 2), "a\n  b");
    }

    #[test]
    fn json_is_safe_and_means_the_same() {
        let hostile = "a\u{9b}\x7f\x1b\u{202e}\n";
        let json = to_json(&hostile).unwrap();
        assert!(json.is_ascii() && !json.trim_end().chars().any(char::is_control), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), hostile);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a\x1b".to_owned(), "b".to_owned()]];
        assert_eq!(table(&["NAME", "X"], &rows), "NAME   X\na\\x1b  b\n");
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(time(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(time(951_827_696_789_000), "2000-02-29T12:34:56.789Z");
        assert_eq!(time(1_767_225_599_999_999), "2025-12-31T23:59:59.999Z");
        assert!(time(u64::MAX).ends_with('Z'));
    }

    #[test]
    fn amounts_read_well() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert!(bytes(u64::MAX).ends_with("PiB"));
        assert_eq!(span(59), "59 s");
        assert_eq!(span(3725), "1 h 2 min");
        assert_eq!(span(90_000), "1 d 1 h");
    }
}
