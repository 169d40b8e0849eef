//! What the guest writes to its serial port, and QEMU to its standard error: hostile text, made fit for a journal.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Characters of the longest line; the rest of it is cut.
const MAX_LINE: usize = 200;
/// Lines that are kept as last words.
const LAST: usize = 5;
/// Lines that may come at once.
const BURST: u32 = 100;
/// A further line each.
const INTERVAL: Duration = Duration::from_millis(200);
/// How a guest begins to say why it ends: its kernel, its init.
const ENDS: [&str; 2] = ["Kernel panic - not syncing: ", "torvm-init: powers off: "];

/// One stream, as lines.
#[derive(Debug)]
pub(crate) struct Console {
    line: String,
    escape: Escape,
    last: VecDeque<String>,
    /// Why the guest ends, in its own words.
    end: Option<String>,
    allowed: u32,
    since: Instant,
    dropped: u64,
}

/// Where in a terminal's escape sequence the stream is (ECMA-48).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Begun,
    /// After `ESC [`.
    Sequence,
    /// In a string, such as a title, to its end or the line's.
    Text,
}

impl Console {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            line: String::new(),
            escape: Escape::None,
            last: VecDeque::new(),
            end: None,
            allowed: BURST,
            since: now,
            dropped: 0,
        }
    }

    /// The lines to print now. They consist of printable ASCII.
    pub(crate) fn feed(&mut self, bytes: &[u8], now: Instant) -> Vec<String> {
        let mut lines = vec![];
        for byte in bytes {
            match (self.escape, *byte) {
                (Escape::None, b'\n') => lines.extend(self.end_line(now)),
                (Escape::None | Escape::Begun, 0x1b) => self.escape = Escape::Begun,
                (Escape::None, b'\t') => self.push(' '),
                (Escape::None, byte @ b' '..=b'~') => self.push(char::from(byte)),
                (Escape::None, 0x80..) => self.push('?'),
                (Escape::None, _) => {}
                (Escape::Begun, b'[') => self.escape = Escape::Sequence,
                (Escape::Begun, b']' | b'P' | b'X' | b'^' | b'_') => self.escape = Escape::Text,
                (Escape::Sequence, b' '..=b'?') => {}
                (Escape::Text, 0x1b) => self.escape = Escape::Begun,
                (Escape::Text, byte) if !matches!(byte, b'\n' | 0x07) => {}
                (Escape::Begun | Escape::Sequence | Escape::Text, _) => self.escape = Escape::None,
            }
        }
        lines
    }

    /// The last lines, oldest first.
    pub(crate) fn last_words(mut self, now: Instant) -> Vec<String> {
        self.end_line(now);
        self.last.into()
    }

    /// Why the guest ends, if it said so.
    pub(crate) fn end(mut self, now: Instant) -> Option<String> {
        self.end_line(now);
        self.end
    }

    fn push(&mut self, char: char) {
        if self.line.len() < MAX_LINE {
            self.line.push(char);
        }
    }

    fn end_line(&mut self, now: Instant) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        let line = line.trim_end();
        if line.is_empty() {
            return None;
        }
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back(line.to_owned());
        // A panic names itself once more in its last line.
        self.end = self.end.take().or_else(|| end_of(line));
        self.refill(now);
        if self.allowed == 0 {
            self.dropped += 1;
            return None;
        }
        self.allowed -= 1;
        let dropped = std::mem::take(&mut self.dropped);
        Some(if dropped == 0 { line.to_owned() } else { format!("({dropped} lines dropped) {line}") })
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since).as_millis() / INTERVAL.as_millis();
        if passed > 0 {
            self.allowed = self.allowed.saturating_add(u32::try_from(passed).unwrap_or(BURST)).min(BURST);
            self.since = now;
        }
    }
}

fn end_of(line: &str) -> Option<String> {
    ENDS.iter().find_map(|begin| line.find(begin)).map(|at| line[at..].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let now = Instant::now();
        Console::new(now).feed(bytes, now)
    }

    #[test]
    fn what_steers_a_terminal_does_not_get_through() {
        assert_eq!(lines(b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1)\r\n"), ["SeaBIOS (version 1)"]);
        assert_eq!(lines(b"a\x07\x08\x00b\tc\x7f\n\x1b\x1b[31mred\x1b[0m\n"), ["ab c", "red"]);
        assert_eq!(lines(b"\x1b]0;title\x07one\n\x1bPabc\x1b\\two\n\x1b]no end\nthree\n"), ["one", "two", "three"]);
        assert_eq!(lines("\u{202e}\u{9b}31m\n".as_bytes()), ["?????31m"]);
        for line in lines(&(0..=255).cycle().take(9999).collect::<Vec<u8>>()) {
            assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces_and_be_endless() {
        let now = Instant::now();
        let mut console = Console::new(now);
        assert!(console.feed(b"on", now).is_empty());
        assert_eq!(console.feed(b"e\ntw", now), ["one"]);
        for _ in 0..1000 {
            assert!(console.feed(&[b'x'; 1000], now).is_empty());
        }
        assert_eq!(console.feed(b"\n", now)[0].len(), MAX_LINE);
        console.feed(b"no end", now);
        assert_eq!(console.last_words(now).last().map(String::as_str), Some("no end"));
    }

    #[test]
    fn of_what_a_guest_says_only_the_cause_of_its_end_counts() {
        let end = |text: &str| {
            let now = Instant::now();
            let mut console = Console::new(now);
            console.feed(text.as_bytes(), now);
            console.end(now)
        };
        assert_eq!(end("\x1bc\x1b[?7l\x1b[2JSeaBIOS (version 1)\r\nBooting from ROM..\n"), None);
        let panic = "[    0.9] Kernel panic - not syncing: No init\x1b[0m\x1b]0;title\x07\n[    0.9] ---[ end Kernel panic - not syncing: No init ]---\n";
        assert_eq!(end(panic).as_deref(), Some("Kernel panic - not syncing: No init"));
        assert_eq!(end("torvm-init: powers off: no disk").as_deref(), Some("torvm-init: powers off: no disk"));
        let long = end(&format!("Kernel panic - not syncing: {}\n", "x".repeat(5000)));
        assert_eq!(long.map(|line| line.len()), Some(MAX_LINE));
    }

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let now = Instant::now();
        let mut console = Console::new(now);
        let printed = console.feed(&b"flood\n".repeat(10_000), now);
        assert_eq!(printed.len(), BURST as usize);
        let later = console.feed(b"calm\ncalm\n", now + INTERVAL);
        assert_eq!(later, ["(9900 lines dropped) calm"]);
        assert_eq!(console.last_words(now).len(), LAST);
    }
}
