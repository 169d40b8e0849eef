//! A token bucket.

use smoltcp::time::Instant;

/// Tokens that come back at a rate.
pub(super) struct Bucket {
    rate: u32,
    tokens: u32,
    filled: Instant,
}

impl Bucket {
    /// A full bucket for `rate` tokens per second, and as many at once.
    pub(super) fn new(rate: u32, now: Instant) -> Self {
        Self { rate, tokens: rate, filled: now }
    }

    /// Takes a token; false when there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = (now - self.filled).total_micros();
        let earned = since.saturating_mul(u64::from(self.rate)) / 1_000_000;
        if earned > 0 {
            self.tokens = u32::try_from(earned).unwrap_or(self.rate).saturating_add(self.tokens).min(self.rate);
            self.filled = now;
        }
        let some = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        some
    }
}
