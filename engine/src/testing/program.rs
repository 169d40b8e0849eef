//! The system of a program, as a model: it says what it likes in any order, and checks all that it is told.

use super::packets::{Packets, Sent};
use super::script::{content, contents};
use crate::packet::parse::{ACK, FIN, RST, SYN};

/// Payload of the largest segment, as the SYN announces.
pub(crate) const MSS: usize = 1400;
/// Bytes of the largest super-segment that the model sends.
const LARGEST: usize = 16_000;

/// One end of one connection. Places are offsets in a sequence space: 0 is the SYN, 1 the first byte.
#[derive(Debug)]
pub(crate) struct Program {
    packets: Packets,
    salt: u8,
    iss: i32,
    /// Bytes that it sends before its FIN, as far as it has made up its mind.
    pub(crate) length: Option<usize>,
    /// Behind the last place that it sent.
    pub(crate) sent: usize,
    /// Behind the last place that the engine acknowledged.
    pub(crate) acknowledged: usize,
    /// What the engine offered last, in bytes.
    pub(crate) offered: usize,
    /// The engine's first sequence number, once its SYN is there.
    theirs: Option<i32>,
    /// Behind the last place of the engine's that came in order.
    pub(crate) received: usize,
    /// What the last segment acknowledged and offered.
    told: (usize, u16),
    /// Behind the last place that the engine may ever have sent to.
    edge: usize,
    /// The engine's FIN came.
    pub(crate) saw_end: bool,
    /// The engine reset the connection.
    pub(crate) was_reset: bool,
    /// It has reset the connection itself.
    pub(crate) has_reset: bool,
    /// It takes no notice of anything.
    pub(crate) deaf: bool,
    /// It sent what makes no sense: nothing can be told about the engine's answers.
    pub(crate) wild: bool,
}

impl Program {
    pub(crate) fn new(packets: Packets, salt: u8, iss: i32) -> Self {
        Self {
            packets,
            salt,
            iss,
            length: None,
            sent: 0,
            acknowledged: 0,
            offered: 0,
            theirs: None,
            received: 0,
            told: (0, 0),
            edge: usize::from(packets.window) + 1,
            saw_end: false,
            was_reset: false,
            has_reset: false,
            deaf: false,
            wild: false,
        }
    }

    /// True from the SYN-ACK on.
    pub(crate) fn was_answered(&self) -> bool {
        self.theirs.is_some()
    }

    /// True between the SYN-ACK and the end.
    pub(crate) fn is_open(&self) -> bool {
        self.was_answered() && !self.is_over()
    }

    /// True when it has nothing more to send or to wait for.
    pub(crate) fn is_over(&self) -> bool {
        let finished = self.saw_end && self.length.is_some_and(|length| self.acknowledged >= length + 2);
        finished || self.was_reset || self.has_reset
    }

    /// Bytes of data that came.
    pub(crate) fn bytes(&self) -> usize {
        self.received.saturating_sub(1 + usize::from(self.saw_end))
    }

    pub(crate) fn syn(&mut self) -> Vec<u8> {
        self.sent = self.sent.max(1);
        self.packets.syn(self.iss)
    }

    /// Up to `most` bytes from place `from` on, and the FIN if `finish` and they reach it.
    pub(crate) fn segment(&mut self, from: usize, most: usize, finish: bool) -> Vec<u8> {
        let from = from.max(1);
        let end = (from + most.min(LARGEST)).min(self.length.map_or(usize::MAX, |length| 1 + length)).max(from);
        let fin = finish && self.length == Some(end - 1);
        self.sent = self.sent.max(end + usize::from(fin));
        let payload = contents(self.salt, from - 1, end - 1);
        self.tcp(if fin { FIN } else { 0 }, from, &payload)
    }

    /// An ACK that offers `window` bytes; nothing when the engine was told that already, since repeated ACKs mean a loss.
    pub(crate) fn acknowledge(&mut self, window: u16) -> Option<Vec<u8>> {
        let news = (self.received, window) != self.told;
        self.packets.window = window;
        news.then(|| self.tcp(0, self.sent.max(1), &[]))
    }

    pub(crate) fn reset(&mut self) -> Vec<u8> {
        self.has_reset = true;
        self.tcp(RST, self.sent.max(1), &[])
    }

    /// Any flags at a place near `at`.
    pub(crate) fn nonsense(&mut self, flags: u8, at: i32, ack: i32, length: usize) -> Vec<u8> {
        self.wild = true;
        let seq = self.iss.wrapping_add(self.acknowledged as i32).wrapping_add(at);
        let ack = self.theirs.unwrap_or(0).wrapping_add(self.received as i32).wrapping_add(ack);
        self.packets.tcp(flags, seq, ack, &vec![0; length])
    }

    fn tcp(&mut self, flags: u8, at: usize, payload: &[u8]) -> Vec<u8> {
        self.edge = self.edge.max(self.received + usize::from(self.packets.window));
        self.told = (self.received, self.packets.window);
        let ack = self.theirs.map_or(0, |theirs| theirs.wrapping_add(self.received as i32));
        self.packets.tcp(flags | ACK, self.iss.wrapping_add(at as i32), ack, payload)
    }

    /// Takes one of the engine's segments in, and gives the answer that is due at once.
    pub(crate) fn take(&mut self, sent: &Sent) -> Result<Option<Vec<u8>>, String> {
        if self.wild {
            return Ok(None);
        }
        if sent.flags & RST != 0 {
            self.was_reset = true;
            return Ok(None);
        }
        if self.was_reset || self.has_reset {
            // RFC 9293 section 3.5.2: a segment of no connection.
            return Ok(Some(self.packets.tcp(RST, sent.ack, 0, &[])));
        }
        if self.deaf {
            return Ok(None);
        }
        let syn = sent.flags & SYN != 0;
        if self.theirs.is_none() && !(syn && sent.ack == self.iss.wrapping_add(1)) {
            // RFC 9293 section 3.10.7.3: what an older connection of this port left.
            return Ok(Some(self.packets.tcp(RST, sent.ack, 0, &[])));
        }
        let at = self.check(sent)?;
        if sent.flags & ACK != 0 {
            let acknowledged = sent.ack.wrapping_sub(self.iss) as u32 as usize;
            self.acknowledged = self.acknowledged.max(acknowledged);
            self.offered = usize::from(sent.window);
        }
        let fin = sent.flags & FIN != 0;
        let end = at + usize::from(syn) + sent.payload.len() + usize::from(fin);
        let news = at <= self.received && end > self.received;
        if news {
            self.received = end;
            self.saw_end = fin;
        }
        // A FIN, and what came already: the engine waits for the answer.
        let answer = fin || !news && (end > at || at < self.received);
        Ok(answer.then(|| self.tcp(0, self.sent, &[])))
    }

    /// What no segment of the engine's may break; gives its place.
    fn check(&mut self, sent: &Sent) -> Result<usize, String> {
        let theirs = *self.theirs.get_or_insert(sent.seq);
        let at = sent.seq.wrapping_sub(theirs) as u32 as usize;
        let end = at + sent.payload.len();
        let acknowledged = sent.ack.wrapping_sub(self.iss) as u32 as usize;
        let content =
            sent.payload.iter().enumerate().all(|(i, byte)| *byte == content(!self.salt, (at + i).wrapping_sub(1)));
        // A keep-alive may carry one byte of no meaning.
        let empty = sent.payload.is_empty() || sent.payload.len() == 1 && end <= self.received;
        let broken = if sent.flags & ACK != 0 && acknowledged > self.sent {
            "acknowledges what was never sent"
        } else if empty {
            return Ok(at);
        } else if at == 0 || !content {
            "carries other bytes than the upstream sent"
        } else if end > self.edge + 1 {
            // One byte more is a probe.
            "exceeds the window"
        } else {
            return Ok(at);
        };
        Err(format!("a segment at {at} with {} bytes {broken}: {:?}", sent.payload.len(), self))
    }
}
