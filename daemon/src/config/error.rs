//! What is wrong in a text, with its place.

use std::ops::Range;

use super::file::FileError;

/// Most characters of a message; what a hostile text can put into one is cut there.
const MAX_MESSAGE: usize = 600;
/// What serde says, and what it is called in the manual.
const WORDS: [(&str, &str); 4] = [
    ("unknown field", "unknown key"),
    ("expected i64", "expected a whole number"),
    ("expected usize", "expected a whole number"),
    ("expected a sequence", "expected a list"),
];

/// Why a profile or the daemon's settings cannot be used. `Display` names the file, the place and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be had or must not be trusted.
    #[error(transparent)]
    File(#[from] FileError),
    /// The text is wrong.
    #[error("{file}:{line}:{column}: {message}")]
    Text {
        /// Path, or a name for a text that did not come from a file of ours.
        file: String,
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What is wrong and what to do.
        message: String,
    },
}

/// A value that cannot be used: what is wrong and what to do, without the place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejected(String);

impl Rejected {
    /// An error with control characters escaped and its length bounded: parts of it come from hostile text.
    #[must_use]
    pub fn new(message: impl AsRef<str>) -> Self {
        let mut text = String::new();
        for (count, c) in message.as_ref().chars().enumerate() {
            if count == MAX_MESSAGE {
                text.push('…');
                break;
            }
            if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
        }
        Self(text)
    }
}

impl From<proxyvpn_torvm::config::Rejected> for Rejected {
    fn from(rejected: proxyvpn_torvm::config::Rejected) -> Self {
        Self::new(rejected.0)
    }
}

/// A text and its name in messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: &'a str,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// An error at the start of `span` (bytes); without a span at the start of the text.
    pub(super) fn error(self, span: Option<Range<usize>>, rejected: Rejected) -> ConfigError {
        let before = span.and_then(|span| self.text.get(..span.start)).unwrap_or_default();
        let line = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        ConfigError::Text { file: Rejected::new(self.file).0, line, column, message: rejected.0 }
    }

    /// Reads the text as `T`, with errors in the words of the manual.
    pub(super) fn parse<T: serde::de::DeserializeOwned>(self) -> Result<T, ConfigError> {
        toml::from_str(self.text).map_err(|error| {
            let message = error.message();
            let message = if message.starts_with("unknown field `password`") {
                "a password does not belong into this file; write it to a file of its own that only root and the daemon \
                 can read, and name that with password-file = \"/path\""
                    .to_owned()
            } else {
                WORDS.iter().fold(message.to_owned(), |text, (serde, ours)| text.replacen(serde, ours, 1))
            };
            self.error(error.span(), Rejected::new(message))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_counted_in_lines_and_characters() {
        let source = Source { file: "f", text: "a = 1\nü = x\n" };
        let at = |start| source.error(Some(start..start), Rejected::new("m")).to_string();
        assert_eq!(at(0), "f:1:1: m");
        assert_eq!(at(6), "f:2:1: m");
        assert_eq!(at(9), "f:2:3: m", "a two-byte character is one column");
        assert_eq!(at(7), "f:1:1: m", "inside a character: no panic");
        assert_eq!(at(999), "f:1:1: m");
    }

    #[test]
    fn a_message_cannot_carry_escapes_or_grow() {
        let rejected = Rejected::new(format!("\x1b[31m{}", "x".repeat(10_000))).to_string();
        assert!(rejected.starts_with("\\u{1b}[31m"), "{rejected}");
        assert!(rejected.chars().count() < MAX_MESSAGE + 20);
    }
}
