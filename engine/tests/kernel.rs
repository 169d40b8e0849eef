//! The engine between the real kernel's TCP on both sides: programs → TUN → engine → servers.

#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a failure here is the test's failure")]

mod lab;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use lab::{Lab, V4, V6, connect, read_pattern, write_pattern};

const MIB: usize = 1024 * 1024;

fn echo(mut stream: TcpStream) {
    let mut chunk = vec![0; 256 * 1024];
    while let Ok(n @ 1..) = stream.read(&mut chunk) {
        if stream.write_all(&chunk[..n]).is_err() {
            return;
        }
    }
}

/// `length` bytes there and back again, both ways at once, ended by half-close.
fn echo_through(address: &'static str, length: usize) -> usize {
    let stream = connect(address, 9000).unwrap();
    let writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        write_pattern(&writer, length).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let total = read_pattern(&stream).unwrap();
    writing.join().unwrap();
    total
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn bytes_pass_unchanged_in_both_families_at_small_and_large_mtu() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    for mtu in [1500, 65535] {
        let running = lab.start(mtu);
        for address in [V4, V6] {
            assert_eq!(lab.program(move || echo_through(address, 64 * MIB)).join().unwrap(), 64 * MIB, "mtu {mtu}");
        }
        running.wait_until_empty();
        assert_eq!(running.counter("bytes-sent"), 128 * MIB as u64);
        assert_eq!(running.counter("bytes-received"), 128 * MIB as u64);
        for drop in ["drop-malformed", "drop-checksum", "drop-device"] {
            assert_eq!(running.counter(drop), 0, "{drop}");
        }
        println!("mtu {mtu}: {}", running.counters());
        assert_eq!(running.stop().len(), 1);
    }
}
