//! A shard among models of programs and upstreams that do what the bytes say.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proxyvpn_engine::harness::turns(bytes));
