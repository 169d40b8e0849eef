//! The firewall in the kernel: what leaves the machine, what does not, and that nothing else is touched.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test firewall -- --ignored`
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod choice;
mod connections;
mod forward;
mod frames;
mod lock;
mod owner;
mod probes;
mod state;
mod tracking;
mod wire;
mod world;
