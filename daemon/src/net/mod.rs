//! The host's network as a mechanism: a desired state is compared with the kernel's, and the difference applied. Knows
//! nothing of profiles, backends or states.
//!
//! - [`desired`]: the desired state and our names in the kernel
//! - [`firewall`]: the nft table: a small value, compiled purely to rules, sent as one transaction

pub mod desired;
pub mod firewall;
