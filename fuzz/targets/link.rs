//! Any frames on a guest's link.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proxyvpn_engine::harness::link(bytes));
