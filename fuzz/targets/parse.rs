//! Frame, IP and TCP headers, checksums, ICMP answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proxyvpn_engine::harness::parse(bytes));
