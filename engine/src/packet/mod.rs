//! Packets as bytes: what comes in is hostile, so lengths are checked here, once, before anything else looks at it.
//!
//! - [`parse`]: sorts a packet
//! - [`checksum`]: the Internet checksum
//! - [`ethernet`]: a guest's frames
//! - [`icmp`]: port-unreachable answers
//! - [`udp`]: datagrams over IPv4
//! - [`vnet`]: the virtio-net header of a TUN queue

pub(crate) mod checksum;
pub(crate) mod ethernet;
pub(crate) mod icmp;
pub(crate) mod parse;
pub(crate) mod udp;
pub(crate) mod vnet;
