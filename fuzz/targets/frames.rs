//! Any frames into a shard.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proxyvpn_engine::harness::frames(bytes));
