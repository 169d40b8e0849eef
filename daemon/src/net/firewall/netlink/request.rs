//! Requests that read: nfnetlink's header, the family, and for some the table's name.

use std::ffi::CStr;

use nftnl::{ProtoFamily, nftnl_sys::libc};

/// `NFTA_TABLE_NAME` and `NFTA_RULE_TABLE` (linux/netfilter/nf_tables.h).
const NAME: u16 = 1;

/// One table of the family `inet`.
pub(super) fn table(table: &CStr) -> Vec<u8> {
    request(libc::NFT_MSG_GETTABLE, libc::NLM_F_ACK, ProtoFamily::Inet, Some(table))
}

/// All chains of a family.
pub(super) fn chains(family: ProtoFamily) -> Vec<u8> {
    request(libc::NFT_MSG_GETCHAIN, libc::NLM_F_DUMP, family, None)
}

/// All rules of a table of the family `inet`.
pub(super) fn rules(table: &CStr) -> Vec<u8> {
    request(libc::NFT_MSG_GETRULE, libc::NLM_F_DUMP, ProtoFamily::Inet, Some(table))
}

fn request(kind: i32, flags: i32, family: ProtoFamily, name: Option<&CStr>) -> Vec<u8> {
    // All of these constants fit.
    let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | kind as u16;
    let flags = (libc::NLM_F_REQUEST | flags) as u16;
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number (set when it is sent) and port.
    message.extend([0; 8]);
    // struct nfgenmsg: family, version, resource.
    message.extend([family as u8, 0, 0, 0]);
    if let Some(name) = name.map(CStr::to_bytes_with_nul) {
        message.extend((4 + name.len() as u16).to_ne_bytes());
        message.extend(NAME.to_ne_bytes());
        message.extend(name);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}
