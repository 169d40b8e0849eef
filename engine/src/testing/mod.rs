//! Doubles for tests, all under a clock that the test sets. Devices are wrappers that compose.
//!
//! - [`packets`]: packets of a program
//! - [`queue`]: the plain device; around it [`faults`] (loss, order, damage) and [`pcap`] (a record)
//! - [`link`]: frames of a guest
//! - [`outside`]: sockets for datagrams
//! - [`upstream`]: attempts that the test answers, and far ends of tunnels
//! - [`bench`]: a shard between such doubles
//! - [`client`]: a complete TCP stack at the other end of the device
//! - [`script`], [`program`], [`world`]: models of programs and upstreams that do what bytes say

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's failure")]
#![cfg_attr(
    not(all(test, feature = "harness")),
    allow(dead_code, unused_imports, reason = "fuzz targets and instruction counts use a part")
)]

mod bench;
mod client;
mod faults;
mod link;
mod outside;
mod packets;
mod pcap;
mod program;
mod queue;
mod script;
mod upstream;
pub(crate) mod world;

pub(crate) use bench::{Bench, LIMITS};
pub(crate) use client::Client;
pub(crate) use faults::{Faults, Rates};
pub(crate) use link::{LINK, guest, guest_ipv4, to_guest, who_has};
pub(crate) use outside::{Outlet, Outside};
pub(crate) use packets::{Packets, Sent, complete, fix_header, read_tcp};
pub(crate) use pcap::{Pcap, TestClock};
pub(crate) use queue::Double;
pub(crate) use script::{Script, contents};
pub(crate) use upstream::{Attempts, Far, pair, tunnel};
