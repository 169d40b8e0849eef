//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum in progress: 16-bit words of the packet, folded only at the end.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// The pseudo-header of TCP, UDP and ICMPv6 (RFC 9293 section 3.1, RFC 8200 section 8.1). Mixed families give a sum that
    /// fits nothing.
    pub(crate) fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let sum = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                Self::default().add(&source.octets()).add(&destination.octets())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                Self::default().add(&source.octets()).add(&destination.octets())
            }
            _ => Self::default(),
        };
        Self(sum.0 + u64::from(protocol) + length as u64)
    }

    /// Adds bytes that start at an even offset; an odd last byte is padded.
    #[must_use]
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let mut sum = self.0;
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            // A 32-bit word is congruent to the sum of its halves modulo 65535.
            sum += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        }
        sum += match *words.remainder() {
            [a, b, c] => u64::from(u16::from_be_bytes([a, b])) + (u64::from(c) << 8),
            [a, b] => u64::from(u16::from_be_bytes([a, b])),
            [a] => u64::from(a) << 8,
            _ => 0,
        };
        Self(sum)
    }

    /// The sum, folded to 16 bits and not complemented: what an offloading device wants in the checksum field.
    pub(crate) fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum for the header.
    pub(crate) fn checksum(self) -> u16 {
        !self.folded()
    }

    /// True when the bytes, checksum included, sum up right.
    pub(crate) fn is_valid(self) -> bool {
        self.folded() == 0xffff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_example_of_rfc_1071() {
        let sum = Sum::default().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), 0xddf2);
        assert_eq!(sum.checksum(), 0x220d);
    }

    #[test]
    fn odd_lengths_are_padded() {
        assert_eq!(Sum::default().add(&[1, 2, 3]).folded(), Sum::default().add(&[1, 2, 3, 0]).folded());
        assert_eq!(Sum::default().add(&[9]).folded(), 0x0900);
    }

    #[test]
    fn all_ones_do_not_overflow() {
        assert_eq!(Sum::default().add(&[0xff; 65535]).add(&[0xff; 65534]).folded(), 0xff00);
    }
}
