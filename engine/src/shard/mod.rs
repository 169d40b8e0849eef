//! A shard: one queue of the device with its own flows, stacks, timers and upstream sockets. All that shards share are totals that
//! change when a flow opens or closes, and the upstream's health, so there may be one per core.
//!
//! - [`admission`]: who may open a flow; the totals of all shards
//! - `bucket`: a rate limit
//! - [`core`]: what happens to a packet, an answer of the upstream, a timer; knows no runtime and is told the time
//! - [`peers`]: segments that the kernel gave to the wrong shard
//! - [`ready`]: what the runtime woke: flows, sockets for datagrams
//! - [`run`]: the loop that feeds the core
//! - [`udp`]: a guest's datagrams; refuses all other UDP

pub(crate) mod admission;
mod bucket;
pub(crate) mod core;
pub(crate) mod peers;
mod ready;
pub(crate) mod run;
#[cfg(test)]
mod tests;
mod udp;
