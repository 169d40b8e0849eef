//! The proxy's answer to CONNECT.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proxyvpn_engine::harness::answer(bytes));
