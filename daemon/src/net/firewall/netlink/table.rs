//! The table itself, as messages. libnftnl would send flags where none are meant, and the kernel takes that for a change.

use std::ffi::CStr;

use nftnl::{ProtoFamily, nftnl_sys::libc};

use super::request::{attribute, body, find, header, patch_length};

/// `NFTA_TABLE_*` (linux/netfilter/nf_tables.h).
const NAME: u16 = 1;
const FLAGS: u16 = 2;
const OWNER: u16 = 7;
/// `NFT_TABLE_F_OWNER`: the table belongs to the socket that makes it, and goes with that.
const OWNED: u32 = 2;

/// The message that makes a table if there is none. `owned`: it belongs to the socket that sends this.
pub(super) fn add(table: &CStr, family: ProtoFamily, owned: bool) -> Vec<u8> {
    message(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, table, family, owned)
}

/// The message that removes a table with all that is in it.
pub(super) fn delete(table: &CStr, family: ProtoFamily) -> Vec<u8> {
    message(libc::NFT_MSG_DELTABLE, 0, table, family, false)
}

fn message(kind: i32, flags: i32, table: &CStr, family: ProtoFamily, owned: bool) -> Vec<u8> {
    let mut message = header(kind, flags, family);
    message.extend(attribute(NAME, table.to_bytes_with_nul()));
    if owned {
        message.extend(attribute(FLAGS, &OWNED.to_be_bytes()));
    }
    patch_length(&mut message);
    message
}

/// Port of the netlink socket to which a table belongs: 0 if it belongs to none, `None` if the message is about something
/// else.
pub(super) fn owner(message: &[u8]) -> Option<u32> {
    let owner = find(body(message, libc::NFT_MSG_NEWTABLE)?, OWNER);
    Some(owner.try_into().map_or(0, u32::from_be_bytes))
}
