//! Choices and contents that follow from bytes, so that a generator of bytes (proptest, a fuzzer) drives a test.

/// Choices read from bytes. When these are used up, every choice is the first.
#[derive(Debug)]
pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A number below `n`, which is at most 65536; 0 for 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let high = if n > 256 { usize::from(self.byte()) << 8 } else { 0 };
        (high | usize::from(self.byte())).checked_rem(n).unwrap_or(0)
    }

    /// The next `n` bytes, or as many as there are.
    pub(crate) fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Byte number `at` of the stream `salt`. Neighbours differ, and so do equal places of two streams.
pub(crate) fn content(salt: u8, at: usize) -> u8 {
    ((at as u32).wrapping_mul(0x9e37_79b1) >> 24) as u8 ^ salt
}

/// Bytes `from..to` of the stream `salt`.
pub(crate) fn contents(salt: u8, from: usize, to: usize) -> Vec<u8> {
    (from..to).map(|at| content(salt, at)).collect()
}
