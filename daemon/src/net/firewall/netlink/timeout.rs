//! The object that holds a timeout, as a message. libnftnl would name each state of a connection, with constants for those
//! that we leave to the machine.

use std::ffi::CStr;

use nftnl::nftnl_sys::libc;

use super::request::{attribute, body, find, header, patch_length};
use crate::net::firewall::rules::Timeout;

/// `NFTA_OBJ_*` (linux/netfilter/nf_tables.h).
const OBJ_TABLE: u16 = 1;
const OBJ_NAME: u16 = 2;
const OBJ_TYPE: u16 = 3;
const OBJ_DATA: u16 = 4;
/// `NFT_OBJECT_CT_TIMEOUT`.
pub(super) const KIND: u32 = 7;
/// `NFTA_CT_TIMEOUT_*`.
const L3PROTO: u16 = 1;
const L4PROTO: u16 = 2;
const POLICY: u16 = 3;
/// `CTA_TIMEOUT_TCP_TIME_WAIT` (linux/netfilter/nfnetlink_cttimeout.h).
const TIME_WAIT: u16 = 7;
/// `NLA_F_NESTED` (linux/netlink.h).
const NESTED: u16 = 1 << 15;

/// An object as the kernel or a transaction describes it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) table: Vec<u8>,
    name: Vec<u8>,
    kind: Vec<u8>,
    protocol: Vec<u8>,
    time_wait: Vec<u8>,
}

/// The message that adds a timeout to a table of the family `inet`.
pub(super) fn add(table: &CStr, timeout: &Timeout) -> Vec<u8> {
    let policy = attribute(TIME_WAIT, &timeout.time_wait.to_be_bytes());
    // One object for both IP versions: the kernel compares the transport protocol only.
    let family = u16::from(libc::NFPROTO_INET.to_le_bytes()[0]);
    let data = [
        attribute(L3PROTO, &family.to_be_bytes()),
        attribute(L4PROTO, &[libc::IPPROTO_TCP.to_le_bytes()[0]]),
        attribute(POLICY | NESTED, &policy),
    ]
    .concat();
    let mut message = header(libc::NFT_MSG_NEWOBJ, libc::NLM_F_CREATE, nftnl::ProtoFamily::Inet);
    message.extend(attribute(OBJ_TABLE, table.to_bytes_with_nul()));
    message.extend(attribute(OBJ_NAME, &[timeout.name.as_bytes(), &[0]].concat()));
    message.extend(attribute(OBJ_TYPE, &KIND.to_be_bytes()));
    message.extend(attribute(OBJ_DATA | NESTED, &data));
    patch_length(&mut message);
    message
}

/// Parses a message about a new object; `None` if it is none. Of a timeout's limits only what [`add`] names is kept.
pub(super) fn object(message: &[u8]) -> Option<Object> {
    let body = body(message, libc::NFT_MSG_NEWOBJ)?;
    let data = find(body, OBJ_DATA);
    let string = |kind| find(body, kind).split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
    Some(Object {
        table: string(OBJ_TABLE),
        name: string(OBJ_NAME),
        kind: find(body, OBJ_TYPE).to_vec(),
        protocol: find(data, L4PROTO).to_vec(),
        time_wait: find(find(data, POLICY), TIME_WAIT).to_vec(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;

    const OURS: Timeout = Timeout { name: "tunnelled", time_wait: 10 };

    #[test]
    fn each_part_is_read_back() {
        let read = |table, timeout| object(&add(table, &timeout)).unwrap();
        let ours = read(c"proxyvpn", OURS);
        assert_eq!((&*ours.table, &*ours.name), (&b"proxyvpn"[..], &b"tunnelled"[..]));
        assert_eq!((&*ours.kind, &*ours.protocol, &*ours.time_wait), (&[0, 0, 0, 7][..], &[6][..], &[0, 0, 0, 10][..]));
        assert_ne!(ours, read(c"proxyvpn", Timeout { time_wait: 120, ..OURS }));
        assert_ne!(ours, read(c"proxyvpn", Timeout { name: "other", ..OURS }));
        assert_ne!(ours, read(c"other", OURS));
    }

    #[test]
    fn noise_is_read_without_a_panic() {
        let message = add(c"proxyvpn", &OURS);
        for at in 0..message.len() {
            assert!(object(&message[..at]).is_none());
            for byte in [0, 1, 3, 4, 0x7f, 0xff] {
                let mut other = message.clone();
                other[at] = byte;
                drop(object(&other));
            }
        }
    }
}
