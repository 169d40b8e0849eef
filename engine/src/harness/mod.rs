//! Entry points for programs outside of this crate that test its inside: the fuzz targets.
//! No part of the interface; only there with the feature `harness`.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "for tests")]

mod fuzz;

pub use fuzz::{answer, frames, parse, turns};
