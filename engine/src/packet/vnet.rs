//! The header in front of each packet of an `IFF_VNET_HDR` queue (`struct virtio_net_hdr`, linux/virtio_net.h), in host byte
//! order: which checksum is still to be computed, and how a large segment is to be cut.

/// Bytes of the header.
pub(crate) const LENGTH: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// True when the checksum of the packet behind `header` need not be verified: this kernel has yet to compute it, or has
/// verified it.
pub(crate) fn is_vouched_for(header: &[u8; LENGTH]) -> bool {
    header[0] & (NEEDS_CSUM | DATA_VALID) != 0
}

/// A TCP packet of ours whose checksum field holds the folded pseudo-header sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TcpOffload {
    /// Length of the IP header.
    pub(crate) ip_header: u16,
    /// Length of the TCP header.
    pub(crate) tcp_header: u16,
    /// Payload bytes per segment; 0 when the packet needs no cutting.
    pub(crate) segment: u16,
    /// IPv6.
    pub(crate) v6: bool,
}

impl TcpOffload {
    /// The header to put in front.
    pub(crate) fn header(self) -> [u8; LENGTH] {
        let mut header = [0; LENGTH];
        header[0] = NEEDS_CSUM;
        header[1] = match (self.segment, self.v6) {
            (0, _) => GSO_NONE,
            (_, false) => GSO_TCPV4,
            (_, true) => GSO_TCPV6,
        };
        if self.segment != 0 {
            header[2..4].copy_from_slice(&(self.ip_header + self.tcp_header).to_ne_bytes());
            header[4..6].copy_from_slice(&self.segment.to_ne_bytes());
        }
        header[6..8].copy_from_slice(&self.ip_header.to_ne_bytes());
        // Where the checksum lies in a TCP header.
        header[8..10].copy_from_slice(&16_u16.to_ne_bytes());
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_fits_asks_for_its_checksum_only() {
        let header = TcpOffload { ip_header: 20, tcp_header: 32, segment: 0, v6: false }.header();
        assert_eq!(header[..2], [NEEDS_CSUM, GSO_NONE]);
        assert_eq!(header[2..6], [0; 4]);
        assert_eq!(u16::from_ne_bytes([header[6], header[7]]), 20);
        assert_eq!(u16::from_ne_bytes([header[8], header[9]]), 16);
        assert!(is_vouched_for(&header));
    }

    #[test]
    fn a_large_segment_says_how_to_cut_it() {
        let header = TcpOffload { ip_header: 40, tcp_header: 32, segment: 1428, v6: true }.header();
        assert_eq!(header[..2], [NEEDS_CSUM, GSO_TCPV6]);
        assert_eq!(u16::from_ne_bytes([header[2], header[3]]), 72);
        assert_eq!(u16::from_ne_bytes([header[4], header[5]]), 1428);
    }

    #[test]
    fn an_empty_header_vouches_for_nothing() {
        assert!(!is_vouched_for(&[0; LENGTH]));
    }
}
