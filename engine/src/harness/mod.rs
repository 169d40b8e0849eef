//! Entry points for programs outside of this crate that test its inside: the fuzz targets and the counting of instructions.
//! No part of the interface; only there with the feature `harness`.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "for tests")]

mod fuzz;
pub mod instructions;

pub use fuzz::{answer, frames, link, parse, turns};
