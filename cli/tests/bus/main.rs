//! proxyctl against a bus of its own and a daemon that plays a script.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test may stop")]

mod connect;
mod fake;
mod reading;
mod terminal;
mod torvm;
mod unreachable;
