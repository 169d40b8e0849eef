//! Lines over a stream from and to somebody who is not trusted: bounded, and nothing is lost when a call is dropped half-way.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that may wait for an other end that does not read.
const MAX_OUTPUT: usize = 16 * 1024;
/// Bytes read at once.
const CHUNK: usize = 4096;

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line without its end, which is a newline with or without a carriage return. What is not UTF-8 is replaced.
    Text(String),
    /// One over the bound; the rest of it is skipped.
    TooLong,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lines<S> {
    stream: S,
    max: usize,
    input: Vec<u8>,
    /// Where the next line starts in `input`.
    start: usize,
    /// Up to where there is no newline.
    searched: usize,
    /// Within a line over the bound.
    skipping: bool,
    output: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Lines<S> {
    /// `max`: bytes of the longest line, with its end.
    pub(crate) const fn new(stream: S, max: usize) -> Self {
        Self { stream, max, input: Vec::new(), start: 0, searched: 0, skipping: false, output: Vec::new() }
    }

    /// The stream below.
    pub(crate) const fn stream(&self) -> &S {
        &self.stream
    }

    /// Has the bytes sent by [`next`](Self::next). `false` when too much waits already: none is sent then.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> bool {
        let fits = self.output.len() + bytes.len() <= MAX_OUTPUT;
        if fits {
            self.output.extend_from_slice(bytes);
        }
        fits
    }

    /// The next line; `None` at the end. What has no end of line by then is dropped. Cancel safe.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Line>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<Line>>> {
        loop {
            self.poll_output(context);
            if let Some(line) = self.take() {
                return Poll::Ready(Ok(Some(line)));
            }
            let mut chunk = [0; CHUNK];
            let mut buffer = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(None));
            }
            self.input.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
            self.input.extend_from_slice(buffer.filled());
        }
    }

    /// An end that is gone shows when it is read from.
    fn poll_output(&mut self, context: &mut Context<'_>) {
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(context, &self.output) {
                Poll::Ready(Ok(written @ 1..)) => drop(self.output.drain(..written)),
                Poll::Ready(_) => self.output.clear(),
                Poll::Pending => return,
            }
        }
    }

    fn take(&mut self) -> Option<Line> {
        loop {
            let newline = self.input.get(self.searched..)?.iter().position(|byte| *byte == b'\n');
            let end = newline.map_or(self.input.len(), |position| self.searched + position + 1);
            let (start, length) = (self.start, end - self.start);
            self.searched = end;
            if newline.is_some() || self.skipping || length > self.max {
                self.start = end;
            }
            match (newline, self.skipping) {
                (Some(_), true) => self.skipping = false,
                (Some(_), false) if length > self.max => return Some(Line::TooLong),
                (Some(_), false) => {
                    let line = &self.input[start..end - 1];
                    let line = line.strip_suffix(b"\r").unwrap_or(line);
                    return Some(Line::Text(String::from_utf8_lossy(line).into_owned()));
                }
                (None, false) if length > self.max => {
                    self.skipping = true;
                    return Some(Line::TooLong);
                }
                (None, _) => return None,
            }
        }
    }
}

/// `text` for a person: without control characters and invisible ones that reorder it, at most `max` characters.
pub(crate) fn clean(text: &str, max: usize) -> String {
    let bad = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut characters = text.chars().map(|c| if bad(c) { ' ' } else { c });
    let mut cleaned: String = characters.by_ref().take(max).collect();
    if characters.next().is_some() {
        cleaned.push('…');
    }
    cleaned
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn text(line: &str) -> Option<Line> {
        Some(Line::Text(line.to_owned()))
    }

    #[test]
    fn lines_come_whole_in_order_and_bounded() {
        run(async {
            let (mut other, ours) = duplex(64);
            let mut lines = Lines::new(ours, 8);
            let writing = tokio::spawn(async move {
                other.write_all(b"one\r\ntwo\n\n1234567\n12345678\nxxxxxxxxxxxxxxxxxxxxxxxxxxx").await.unwrap();
                tokio::task::yield_now().await;
                other.write_all(b"yyy\nlast\nunfin").await.unwrap();
            });
            for expected in [
                text("one"),
                text("two"),
                text(""),
                text("1234567"),
                Some(Line::TooLong),
                Some(Line::TooLong),
                text("last"),
                None,
            ] {
                assert_eq!(lines.next().await.unwrap(), expected);
            }
            writing.await.unwrap();
        });
    }

    #[test]
    fn what_is_sent_arrives_although_calls_are_dropped() {
        run(async {
            let (mut other, ours) = duplex(16);
            let mut lines = Lines::new(ours, 8);
            let message: Vec<u8> = (0..200).collect();
            assert!(lines.send(&message));
            let mut got = vec![];
            while got.len() < 200 {
                // Polled once each time, then dropped.
                tokio::select! { biased; _ = lines.next() => {}, () = std::future::ready(()) => {} }
                let mut piece = [0; 16];
                let read = other.read(&mut piece).await.unwrap();
                got.extend_from_slice(&piece[..read]);
            }
            assert_eq!(got, message);
            assert!(lines.send(&[0; MAX_OUTPUT]) && !lines.send(&[0]), "what nobody reads is bounded");
        });
    }

    proptest! {
        #[test]
        fn however_it_is_cut_it_is_the_same(pieces in prop::collection::vec("[a\n\r]{0,12}", 0..12)) {
            let (whole, cut) = run(async {
                let mut results = vec![];
                for pieces in [vec![pieces.concat()], pieces] {
                    let (mut other, ours) = duplex(4);
                    let mut lines = Lines::new(ours, 6);
                    let writing = tokio::spawn(async move {
                        for piece in pieces {
                            other.write_all(piece.as_bytes()).await.unwrap();
                        }
                    });
                    let mut got = vec![];
                    while let Some(line) = lines.next().await.unwrap() {
                        assert!(lines.input.len() <= 6 + 1 + CHUNK);
                        got.push(line);
                    }
                    writing.await.unwrap();
                    results.push(got);
                }
                (results.remove(0), results.remove(0))
            });
            prop_assert_eq!(whole, cut);
        }
    }

    #[test]
    fn text_for_people_is_one_short_line() {
        assert_eq!(clean("a\n\u{1b}[31mb\u{202e}\u{9b}", 20), "a  [31mb  ");
        assert_eq!(clean("12345", 5), "12345");
        assert_eq!(clean("123456", 5), "12345…");
    }
}
