//! QEMU's own protocol: one JSON object in a line (docs/interop/qmp-spec of QEMU). QEMU is not trusted, for the guest may have taken it
//! over.

use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::lines::{Line, Lines, clean};

/// Bytes of the longest line.
const MAX_LINE: usize = 64 * 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Qmp {
    lines: Lines<UnixStream>,
    /// Number of the newest command.
    id: u64,
    over: bool,
}

/// What QEMU tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// The guest powers off, or QEMU ends: `SHUTDOWN` with its reason, as in `guest-shutdown`.
    Shutdown(String),
    /// The guest stands still.
    Stopped,
    /// The guest goes on.
    Resumed,
    /// The guest's kernel has given up.
    Panicked,
    /// Answer to the newest [`Qmp::ask_status`]: as in `running`.
    Status(String),
    /// QEMU closed the connection.
    Over,
}

impl Qmp {
    /// Takes a connection over; `anew`: an earlier process had it, and may have left half a command.
    pub(super) fn new(stream: UnixStream, anew: bool) -> Self {
        let mut qmp = Self { lines: Lines::new(stream, MAX_LINE), id: 0, over: false };
        if anew {
            // Puts QEMU's parser into its first state (qobject/json-lexer.c).
            qmp.lines.send(b"\xff");
        }
        // Where it was negotiated before, this is an error that changes nothing.
        qmp.command("qmp_capabilities");
        qmp
    }

    /// Asks for the guest's state.
    pub(super) fn ask_status(&mut self) {
        self.command("query-status");
    }

    /// Presses the power button.
    pub(super) fn power_down(&mut self) {
        self.command("system_powerdown");
    }

    /// Has QEMU end at once.
    pub(super) fn quit(&mut self) {
        self.command("quit");
    }

    fn command(&mut self, command: &str) {
        self.id += 1;
        // One that QEMU does not read any more makes no difference: its silence is noticed.
        self.lines.send(format!("{}\n", json!({ "execute": command, "id": self.id })).as_bytes());
    }

    /// What QEMU tells next. After [`Told::Over`] nothing comes any more. Cancel safe.
    pub(super) async fn next(&mut self) -> Told {
        if self.over {
            return std::future::pending().await;
        }
        loop {
            match self.lines.next().await {
                Ok(Some(Line::Text(line))) => {
                    if let Some(told) = understand(&line, self.id) {
                        return told;
                    }
                }
                Ok(Some(Line::TooLong)) => {}
                Ok(None) | Err(_) => {
                    self.over = true;
                    return Told::Over;
                }
            }
        }
    }

    /// Whether QEMU closed the connection.
    pub(super) const fn over(&self) -> bool {
        self.over
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.stream().as_fd()
    }
}

/// What a line says; `None` for what nobody needs, such as the greeting and half a line. `id`: of the newest command.
fn understand(line: &str, id: u64) -> Option<Told> {
    let message: Value = serde_json::from_str(line).ok()?;
    match message.get("event").and_then(Value::as_str) {
        Some("SHUTDOWN") => {
            let reason = message.pointer("/data/reason").and_then(Value::as_str).unwrap_or_default();
            Some(Told::Shutdown(clean(reason, 64)))
        }
        Some("STOP") => Some(Told::Stopped),
        Some("RESUME") => Some(Told::Resumed),
        Some("GUEST_PANICKED") => Some(Told::Panicked),
        Some(_) => None,
        None => {
            let status = message.pointer("/return/status").and_then(Value::as_str)?;
            (message.get("id").and_then(Value::as_u64) == Some(id)).then(|| Told::Status(clean(status, 64)))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_matters_is_understood() {
        let cases = [
            (
                r#"{"timestamp":{"seconds":1},"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#,
                Some(Told::Shutdown("guest-shutdown".into())),
            ),
            (r#"{"event":"SHUTDOWN"}"#, Some(Told::Shutdown(String::new()))),
            (r#"{"event":"STOP"}"#, Some(Told::Stopped)),
            (r#"{"event":"RESUME"}"#, Some(Told::Resumed)),
            (r#"{"event":"GUEST_PANICKED","data":{"action":"pause"}}"#, Some(Told::Panicked)),
            (r#"{"return":{"running":true,"status":"running"},"id":7}"#, Some(Told::Status("running".into()))),
            (r#"{"return":{"running":true,"status":"running"},"id":6}"#, None),
            (r#"{"return":{},"id":7}"#, None),
            (r#"{"error":{"class":"CommandNotFound"},"id":7}"#, None),
            (r#"{"QMP":{"version":{},"capabilities":[]}}"#, None),
            (r#"us":"running"},"id":7}"#, None),
            (r#"{"event":7}"#, None),
            ("[[[[", None),
            ("", None),
        ];
        for (line, told) in cases {
            assert_eq!(understand(line, 7), told, "{line}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(line in ".{0,200}") {
            let _ = understand(&line, 1);
        }
    }
}
