//! What went wrong on the way, in the user's words.

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::Reason;

/// Why a connection cannot be had: a stable code and a sentence with cause, effect and next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Stable code.
    pub code: ReasonCode,
    /// For people.
    pub text: String,
}

impl Failure {
    /// A failure with its text.
    pub fn new(code: ReasonCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// A failure whose text is `error` with all its causes.
    pub fn from_error(code: ReasonCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(code, chain(error))
    }

    /// As it stands on the bus.
    #[must_use]
    pub fn reason(&self) -> Reason {
        Reason { code: self.code.as_str().to_owned(), text: self.text.clone() }
    }
}

/// `error` and its causes in one line: `operation: cause: cause`.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
