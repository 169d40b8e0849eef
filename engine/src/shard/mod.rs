//! A shard: one queue of the device with its own flows, stacks, timers and upstream sockets. Shards share nothing but the
//! health of the upstream, so there may be one per core.
//!
//! - [`core`]: what happens to a packet, an answer of the upstream, a timer; knows no runtime and is told the time
//! - [`ready`]: flows that the runtime woke
//! - [`run`]: the loop that feeds the core

pub(crate) mod core;
mod ready;
pub(crate) mod run;
#[cfg(test)]
mod tests;
