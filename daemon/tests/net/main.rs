//! The host's network in the kernel: what is applied, and that all of it and nothing else is taken back.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test net -- --ignored`
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod around;
mod conflicts;
mod fairness;
mod kept;
mod older;
mod router;
mod steering;
mod traces;
mod uplinks;
mod watching;
mod world;
