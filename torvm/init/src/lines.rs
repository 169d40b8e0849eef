//! Lines out of a stream, bounded: what is longer is cut, and its rest is lost.

/// See the module.
pub(crate) struct Lines {
    longest: usize,
    line: Vec<u8>,
}

impl Lines {
    /// `longest`: bytes kept of a line, without its newline.
    pub(crate) fn new(longest: usize) -> Self {
        Self { longest, line: Vec::new() }
    }

    /// Takes the next bytes and calls `each` for every line that they end.
    pub(crate) fn take(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for &byte in bytes {
            if byte == b'\n' {
                each(&self.line);
                self.line.clear();
            } else if self.line.len() < self.longest {
                self.line.push(byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(longest: usize, parts: &[&str]) -> Vec<String> {
        let mut lines = Lines::new(longest);
        let mut found = Vec::new();
        for part in parts {
            lines.take(part.as_bytes(), |line| found.push(String::from_utf8_lossy(line).into_owned()));
        }
        found
    }

    #[test]
    fn lines_come_whole_however_the_stream_is_cut() {
        assert_eq!(lines(10, &["on", "e\ntwo", "\n\nthr"]), ["one", "two", ""]);
    }

    #[test]
    fn a_long_line_is_cut_and_the_next_is_whole() {
        assert_eq!(lines(3, &["abcdef", "ghi\nxyz\n"]), ["abc", "xyz"]);
    }
}
