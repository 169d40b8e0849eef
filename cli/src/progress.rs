//! Progress on standard error: one line that is redrawn on a terminal, one line a step elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Instant;

use proxyvpn_dbus::types::Bootstrap;

use crate::text;

/// Shows how far an attempt is.
#[derive(Debug)]
pub(crate) struct Display {
    redraw: bool,
    started: Instant,
    shown: String,
    /// What Tor warned of last.
    warned: String,
}

impl Display {
    /// For standard error as it is.
    pub(crate) fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Self {
            redraw: io::stderr().is_terminal() && !dumb,
            started: Instant::now(),
            shown: String::new(),
            warned: String::new(),
        }
    }

    /// Whether the line is redrawn, so that the time in it needs a tick.
    pub(crate) const fn redraws(&self) -> bool {
        self.redraw
    }

    /// Shows a step; the same one again shows nothing elsewhere than on a terminal.
    pub(crate) fn show(&mut self, state: &str, phase: &str, percent: u32, summary: &str) {
        self.draw(step(state, phase, percent, summary));
    }

    /// Shows how far Tor is, and what it warns of.
    pub(crate) fn tor(&mut self, bootstrap: &Bootstrap) {
        let warning = warning(bootstrap);
        if !warning.is_empty() && warning != self.warned {
            self.clear();
            text::note(&warning);
        }
        self.warned = warning;
        let percent = bootstrap.percent.min(100);
        let summary = text::line(&bootstrap.summary);
        self.draw(if self.redraw {
            let done = usize::try_from(percent / 5).unwrap_or_default();
            format!("Tor [{:-<20}] {percent}%  {summary}", "#".repeat(done))
        } else {
            format!("Tor {percent}%: {summary}")
        });
    }

    fn draw(&mut self, step: String) {
        let new = step != self.shown;
        self.shown = step;
        if self.redraw {
            self.tick();
        } else if new {
            text::note(&self.shown);
        }
    }

    /// Redraws the line with the time that has gone by.
    pub(crate) fn tick(&self) {
        if !self.redraw || self.shown.is_empty() {
            return;
        }
        let columns = rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col));
        // A terminal that does not know its size says 0.
        let columns = if columns < 20 { 80 } else { columns };
        let line = format!("{}  {}", self.shown, text::span(self.started.elapsed().as_secs()));
        // One column stays free, or the terminal would wrap.
        let line: String = line.chars().take(columns - 1).collect();
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r{line}\x1b[K").and_then(|()| stderr.flush());
    }
}

impl Display {
    /// Takes the line away.
    fn clear(&self) {
        if self.redraw && !self.shown.is_empty() {
            let mut stderr = io::stderr().lock();
            let _ = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What Tor warns of and what may be done, as one line.
fn warning(bootstrap: &Bootstrap) -> String {
    if bootstrap.warning.is_empty() && bootstrap.hint.is_empty() {
        return String::new();
    }
    let mut line = "proxyctl: warning: Tor is held up".to_owned();
    if !bootstrap.warning.is_empty() {
        line.push_str(&format!(": {}", bootstrap.warning));
    }
    if !bootstrap.reason.is_empty() {
        line.push_str(&format!(" ({})", bootstrap.reason));
    }
    if !bootstrap.hint.is_empty() {
        line.push_str(&format!(". {}", bootstrap.hint));
    }
    text::line(&line).into_owned()
}

fn step(state: &str, phase: &str, percent: u32, summary: &str) -> String {
    let mut step = text::line(state).into_owned();
    if !phase.is_empty() {
        step.push_str(&format!(": {}", text::line(phase)));
    }
    if percent > 0 {
        step.push_str(&format!(" {}%", percent.min(100)));
    }
    if !summary.is_empty() && summary != phase {
        step.push_str(&format!(" ({})", text::line(summary)));
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_one_safe_line() {
        let bootstrap = |warning: &str, reason: &str, hint: &str| Bootstrap {
            warning: warning.to_owned(),
            reason: reason.to_owned(),
            hint: hint.to_owned(),
            ..Bootstrap::default()
        };
        assert_eq!(warning(&bootstrap("", "", "")), "");
        assert_eq!(
            warning(&bootstrap("No route\x1b[2J", "NOROUTE", "Is there a network?")),
            "proxyctl: warning: Tor is held up: No route\\x1b[2J (NOROUTE). Is there a network?"
        );
    }

    #[test]
    fn a_step_is_one_safe_line() {
        assert_eq!(
            step("connecting", "create-tun", 40, "creating pvpn0"),
            "connecting: create-tun 40% (creating pvpn0)"
        );
        assert_eq!(step("connecting", "", 0, ""), "connecting");
        assert_eq!(step("connecting", "a\x1b[2J", 900, "b\n"), "connecting: a\\x1b[2J 100% (b\\x0a)");
    }
}
