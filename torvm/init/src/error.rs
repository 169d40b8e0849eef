//! What goes wrong. All of it ends the guest, so one type carries the cause to the host.

use std::error::Error as _;
use std::io;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A system call or a file.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A helper program.
    #[error("{program}: {how}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended, and its last words.
        how: String,
    },
    /// What the host gave, or what the image holds, is not as it must be.
    #[error("{0}")]
    Wrong(String),
}

/// Names what failed.
pub(crate) trait While<T> {
    /// `what`: what was tried.
    fn during(self, what: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> While<T> for Result<T, E> {
    fn during(self, what: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what.into(), source: source.into() })
    }
}

/// The error and its causes in one line.
pub(crate) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
