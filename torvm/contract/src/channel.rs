//! Lines between host and guest while it runs, over a virtio-serial port. Each is a JSON object and ends with a newline. The host does
//! not trust the guest: what is longer than [`MAX_LINE`] or not understood is dropped and counted.

use serde::{Deserialize, Serialize};

/// Name of the port in the guest (`/sys/class/virtio-ports/*/name`).
pub const PORT: &str = "org.proxyvpn.channel";
/// Bytes of the longest line, with its newline.
pub const MAX_LINE: usize = 1024;
/// Bytes of the longest text in a line, so that the line is not longer than [`MAX_LINE`] when each byte must be escaped.
pub const MAX_TEXT: usize = 448;
/// How often the guest says [`Status::Alive`], in milliseconds.
pub const HEARTBEAT_MS: u64 = 2_000;

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Status {
    /// PID 1 runs.
    Init,
    /// Firewall, devices and addresses are there: traffic of the host may come.
    Network,
    /// The state disk is mounted.
    State {
        /// What was done to it.
        disk: Disk,
    },
    /// Tor was started.
    Tor,
    /// All is as it should be.
    Alive,
    /// A line of Tor's log, from the level on that the configuration names.
    Log {
        /// `err`, `warn`, `notice` or `info`.
        level: String,
        /// Without time and level.
        text: String,
    },
    /// The guest powers off.
    Off {
        /// Why.
        cause: String,
    },
}

impl Status {
    /// A line of the log; `text` is made to fit.
    #[must_use]
    pub fn log(level: &str, text: &str) -> Self {
        Self::Log { level: level.to_owned(), text: fitting(text) }
    }

    /// The guest's last line; `cause` is made to fit.
    #[must_use]
    pub fn off(cause: &str) -> Self {
        Self::Off { cause: fitting(cause) }
    }
}

/// Without control characters, and not longer than [`MAX_TEXT`].
fn fitting(text: &str) -> String {
    let mut fits = String::new();
    for character in text.chars().map(|character| if character.is_whitespace() { ' ' } else { character }) {
        if fits.len() + character.len_utf8() > MAX_TEXT {
            break;
        }
        if !character.is_control() {
            fits.push(character);
        }
    }
    fits
}

/// What became of the state disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disk {
    /// It was blank and got a file system.
    Made,
    /// It was checked and is good.
    Kept,
    /// It was repaired.
    Repaired,
    /// It could not be repaired and was made anew: Tor chooses other guards.
    Reset,
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// Set the clock.
    Clock {
        /// Microseconds since 1970-01-01 UTC.
        unix_micros: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_fits_into_a_line() -> Result<(), serde_json::Error> {
        for text in [
            "\"".repeat(5000),
            "\\".repeat(5000),
            "\u{1}".repeat(5000),
            "ä".repeat(5000),
            "a\nb\u{7f}\u{9b}c".to_owned(),
        ] {
            for status in [Status::log("notice", &text), Status::off(&text)] {
                let line = serde_json::to_string(&status)?;
                assert!(line.len() < MAX_LINE, "{} bytes", line.len());
                assert!(!line.contains(char::is_control), "{line:?}");
                assert_eq!(serde_json::from_str::<Status>(&line)?, status);
            }
        }
        assert_eq!(Status::off("a\nb\u{7f}\u{9b}c"), Status::Off { cause: "a bc".to_owned() });
        Ok(())
    }
}
