//! From lines to replies (control-spec section 2.3).

/// Lines of a reply, data included.
const MAX_LINES: usize = 8192;
/// Bytes of a reply.
const MAX_BYTES: usize = 512 * 1024;
/// Code of what Tor tells by itself.
pub(super) const EVENT: u16 = 650;

/// A reply, or an event.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    /// Of its last line.
    pub(super) code: u16,
    pub(super) parts: Vec<Part>,
}

/// One line, with what followed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) text: String,
    /// Of a line with `+`.
    pub(super) data: Vec<String>,
}

impl Reply {
    /// The text of its last line.
    pub(super) fn text(&self) -> &str {
        self.parts.last().map_or("", |part| &part.text)
    }

    /// The value of `key` in the answer to GETINFO (section 3.9): the rest of its line, and the data.
    pub(super) fn value(&self, key: &str) -> Option<(&str, &[String])> {
        self.parts.iter().find_map(|part| Some((part.text.strip_prefix(key)?.strip_prefix('=')?, &*part.data)))
    }
}

/// Why what came can't be of a Tor that is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// No code and separator.
    Line,
    /// Over a bound.
    TooLarge,
}

/// Puts lines together. Events may come between the lines of a reply.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reply: Pending,
    event: Pending,
    /// Data of which of the two comes now.
    data: Option<bool>,
}

#[derive(Debug, Default)]
struct Pending {
    parts: Vec<Part>,
    lines: usize,
    bytes: usize,
}

impl Assembler {
    /// Takes a line without its end; gives what it completes.
    pub(super) fn feed(&mut self, line: &str) -> Result<Option<Reply>, Malformed> {
        if let Some(event) = self.data {
            let pending = if event { &mut self.event } else { &mut self.reply };
            if line == "." {
                self.data = None;
                return Ok(None);
            }
            pending.count(line)?;
            // A dot in front of a dot is not part of the data (section 2.1.1).
            let line = line.strip_prefix('.').unwrap_or(line);
            pending.parts.last_mut().ok_or(Malformed::Line)?.data.push(line.to_owned());
            return Ok(None);
        }
        let (code, separator, text) = split(line).ok_or(Malformed::Line)?;
        let event = code == EVENT;
        let pending = if event { &mut self.event } else { &mut self.reply };
        pending.count(text)?;
        pending.parts.push(Part { text: text.to_owned(), data: vec![] });
        match separator {
            b' ' => return Ok(Some(Reply { code, parts: std::mem::take(pending).parts })),
            b'+' => self.data = Some(event),
            b'-' => {}
            _ => return Err(Malformed::Line),
        }
        Ok(None)
    }
}

impl Pending {
    fn count(&mut self, line: &str) -> Result<(), Malformed> {
        self.lines += 1;
        self.bytes += line.len();
        if self.lines > MAX_LINES || self.bytes > MAX_BYTES { Err(Malformed::TooLarge) } else { Ok(()) }
    }
}

fn split(line: &str) -> Option<(u16, u8, &str)> {
    let code = line.get(..3).filter(|code| code.bytes().all(|byte| byte.is_ascii_digit()))?;
    Some((code.parse().ok()?, *line.as_bytes().get(3)?, line.get(4..)?))
}

/// The keywords of a line: `KEY=value` or `KEY="value"`, in which a backslash makes the next character mean itself (section 2.1).
/// Other words are passed over.
pub(super) fn keywords(mut text: &str) -> impl Iterator<Item = (&str, String)> {
    std::iter::from_fn(move || {
        loop {
            text = text.trim_start();
            let end = text.find([' ', '=']).unwrap_or(text.len());
            let (key, rest) = text.split_at(end);
            let Some(value) = rest.strip_prefix('=') else {
                text = rest;
                if text.is_empty() {
                    return None;
                }
                continue;
            };
            let (value, left) = value.strip_prefix('"').map_or_else(|| plain(value), quoted);
            text = left;
            return Some((key, value));
        }
    })
}

fn plain(text: &str) -> (String, &str) {
    let (value, rest) = text.split_at(text.find(' ').unwrap_or(text.len()));
    (value.to_owned(), rest)
}

/// `text` starts behind the opening quote. One that is not closed goes to the end.
fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replies(text: &str) -> Result<Vec<Reply>, Malformed> {
        let mut assembler = Assembler::default();
        text.lines().filter_map(|line| assembler.feed(line).transpose()).collect()
    }

    #[test]
    fn replies_with_data_and_events_between_their_lines() {
        let replies = replies(
            "250-version=0.4.9\n650-CIRC 1\n250+circuit-status=\n1 BUILT\n..dot\n650 not an event\n.\n650+NS\ndata\n.\n650 OK\n250 OK\n515 Bad",
        )
        .unwrap();
        assert_eq!(replies.len(), 3);
        assert_eq!(replies[0].code, EVENT);
        assert_eq!(replies[0].parts[0].text, "CIRC 1");
        assert_eq!(replies[0].parts[1].data, ["data"]);
        let reply = &replies[1];
        assert_eq!((reply.code, reply.text()), (250, "OK"));
        assert_eq!(reply.value("version").unwrap().0, "0.4.9");
        assert_eq!(reply.value("circuit-status").unwrap().1, ["1 BUILT", ".dot", "650 not an event"]);
        assert_eq!(reply.value("vers"), None);
        assert_eq!((replies[2].code, replies[2].text()), (515, "Bad"));
    }

    #[test]
    fn what_is_not_a_reply_is_refused() {
        for bad in ["", "25", "250", "abc OK", "250=OK", "250é", "+50 OK", "2é50 OK"] {
            assert_eq!(Assembler::default().feed(bad), Err(Malformed::Line), "{bad}");
        }
    }

    #[test]
    fn a_reply_without_end_is_not_collected_for_ever() {
        for line in ["250-x", "650-x", "data"] {
            let mut assembler = Assembler::default();
            assembler.feed("250+x=").unwrap();
            if line != "data" {
                assembler.feed(".").unwrap();
            }
            let refused = (0..=MAX_LINES).find_map(|_| assembler.feed(line).err());
            assert_eq!(refused, Some(Malformed::TooLarge), "{line}");
            let mut assembler = Assembler::default();
            let long = format!("250-{}", "x".repeat(MAX_BYTES / 2));
            assert!(assembler.feed(&long).is_ok() && assembler.feed(&long).is_ok());
            assert_eq!(assembler.feed(&long), Err(Malformed::TooLarge));
        }
    }

    #[test]
    fn keywords_with_quotes() {
        let text = r#"NOTICE BOOTSTRAP PROGRESS=14 SUMMARY="a \"b\" \\ c=d" EMPTY= TAG=conn OPEN="x"#;
        let expected =
            [("PROGRESS", "14"), ("SUMMARY", "a \"b\" \\ c=d"), ("EMPTY", ""), ("TAG", "conn"), ("OPEN", "x")];
        let found: Vec<_> = keywords(text).collect();
        assert_eq!(found, expected.map(|(key, value)| (key, value.to_owned())));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(lines in prop::collection::vec("(250|650|5)?[-+ ]?.{0,20}|\\.", 0..50)) {
            let mut assembler = Assembler::default();
            for line in lines {
                let _ = assembler.feed(&line);
                let _ = keywords(&line).count();
            }
        }
    }
}
