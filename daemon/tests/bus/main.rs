//! The service on a real bus with the real polkitd, each test on a bus of its own.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test bus -- --ignored`
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod callers;
mod hostile;
mod matrix;
mod prompts;
mod world;
