//! The virtual machine as the daemon sees it: its image, its start through the launcher, its life and its end. Mechanism: knows no
//! profiles and no states. Neither the guest nor QEMU is trusted: what comes from them is bounded, and text is free of control
//! characters.
//!
//! - `image`: kernel and initramfs, checked against their manifest
//! - `disk`: what the guest keeps: its state disk
//! - `config`: the guest's configuration as a file in memory
//! - [`accel`]: whether the processor or QEMU runs the guest's instructions
//! - `launcher`: the connection by which QEMU is started and ended
//! - `qmp`: QEMU's own protocol
//! - `channel`: what the guest tells, and is told
//! - `machine`: all of it while it runs

pub mod accel;
mod channel;
mod config;
mod disk;
mod error;
mod image;
mod launcher;
mod machine;
mod qmp;
mod sys;
#[cfg(test)]
mod tests;

pub use error::Error;
pub use image::Image;
pub use machine::{Event, Kept, PoweredDown, Spec, Vm};
