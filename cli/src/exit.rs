//! Exit codes, and the failures that lead to them.

use std::io;

use crate::text;

/// Exit code of proxyctl. Documented in `--help` and `proxyctl(1)`; a number never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// It failed; the text says why.
    Failure = 1,
    /// The command line is wrong.
    Usage = 2,
    /// `status --check`, `reconnect`: there is no connection.
    NotConnected = 3,
    /// polkit or the bus refused.
    NotAuthorised = 4,
    /// The time was over.
    TimedOut = 5,
    /// The connection is wanted but broken, and traffic is stopped.
    Blocked = 6,
    /// The bus or the daemon cannot be reached.
    Unreachable = 7,
    /// Stopped by Ctrl-C or SIGTERM.
    Interrupted = 130,
}

impl Exit {
    /// Every code with its meaning, as the help shows it.
    pub(crate) const ALL: [(Self, &str); 9] = [
        (Self::Ok, "success"),
        (Self::Failure, "failure"),
        (Self::Usage, "wrong usage"),
        (Self::NotConnected, "not connected (status --check, reconnect)"),
        (Self::NotAuthorised, "not authorised"),
        (Self::TimedOut, "timed out"),
        (Self::Blocked, "blocked: the connection is wanted but broken, and traffic is stopped"),
        (Self::Unreachable, "the daemon cannot be reached"),
        (Self::Interrupted, "interrupted"),
    ];

    /// The section of `--help`.
    pub(crate) fn help() -> String {
        let mut help = String::from("Exit codes:\n");
        for (code, meaning) in Self::ALL {
            help.push_str(&format!("{:>5}  {meaning}\n", code as u8));
        }
        help
    }
}

/// Why a command ends without success: cause, then effect and next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) exit: Exit,
    /// What went wrong; empty when there is nothing to say.
    pub(crate) cause: String,
    /// Effect and next step.
    pub(crate) advice: String,
}

impl Failure {
    /// A failure without advice.
    pub(crate) fn new(exit: Exit, cause: impl Into<String>) -> Self {
        Self { exit, cause: cause.into(), advice: String::new() }
    }

    /// Adds effect and next step.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// An exit code without a text.
    pub(crate) fn quiet(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// An error when writing the output. A reader that has gone (`proxyctl logs | head`) has what it wanted.
    pub(crate) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::quiet(Exit::Ok)
        } else {
            Self::new(Exit::Failure, format!("cannot write the output: {error}"))
        }
    }

    /// What standard error shows.
    pub(crate) fn message(&self) -> String {
        if self.cause.is_empty() {
            return String::new();
        }
        let mut message = format!("proxyctl: {}\n", text::indented(&self.cause, 2));
        if !self.advice.is_empty() {
            message.push_str(&format!("  {}\n", text::indented(&self.advice, 2)));
        }
        message
    }
}

/// What a command gives back.
pub(crate) type Outcome = Result<Exit, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_cause_and_advice_and_no_terminal_sequences() {
        let failure = Failure::new(Exit::Failure, "bad\x1b[2J\nsecond").advise("do this");
        assert_eq!(failure.message(), "proxyctl: bad\\x1b[2J\n  second\n  do this\n");
        assert_eq!(Failure::quiet(Exit::Ok).message(), "");
    }

    #[test]
    fn the_help_names_every_code() {
        let help = Exit::help();
        for (code, meaning) in Exit::ALL {
            assert!(help.contains(&format!("{:>5}  {meaning}", code as u8)));
        }
    }
}
