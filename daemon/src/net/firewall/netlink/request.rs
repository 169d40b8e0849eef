//! Requests that read, and what messages are made of: nfnetlink's header, the family, attributes.

use std::ffi::CStr;

use nftnl::{ProtoFamily, nftnl_sys::libc};

/// `NFTA_TABLE_NAME`, `NFTA_RULE_TABLE` and `NFTA_OBJ_TABLE` (linux/netfilter/nf_tables.h).
const NAME: u16 = 1;
/// The bits of an attribute's type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` (linux/netlink.h).
const TYPE: u16 = 0x3fff;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;

/// One table of a family.
pub(super) fn table(table: &CStr, family: ProtoFamily) -> Vec<u8> {
    request(libc::NFT_MSG_GETTABLE, libc::NLM_F_ACK, family, Some(table))
}

/// All chains of a family.
pub(super) fn chains(family: ProtoFamily) -> Vec<u8> {
    request(libc::NFT_MSG_GETCHAIN, libc::NLM_F_DUMP, family, None)
}

/// All rules of a table of a family.
pub(super) fn rules(table: &CStr, family: ProtoFamily) -> Vec<u8> {
    request(libc::NFT_MSG_GETRULE, libc::NLM_F_DUMP, family, Some(table))
}

/// All objects of a table of the family `inet`.
pub(super) fn objects(table: &CStr) -> Vec<u8> {
    request(libc::NFT_MSG_GETOBJ, libc::NLM_F_DUMP, ProtoFamily::Inet, Some(table))
}

fn request(kind: i32, flags: i32, family: ProtoFamily, name: Option<&CStr>) -> Vec<u8> {
    let mut message = header(kind, flags, family);
    if let Some(name) = name {
        message.extend(attribute(NAME, name.to_bytes_with_nul()));
    }
    patch_length(&mut message);
    message
}

/// `struct nlmsghdr` without its length, and `struct nfgenmsg`.
pub(super) fn header(kind: i32, flags: i32, family: ProtoFamily) -> Vec<u8> {
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
    message
}

/// `struct nlattr` with its value, padded.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut attribute = (4 + value.len() as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// Writes the length of a message that is complete.
pub(super) fn patch_length(message: &mut [u8]) {
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
}

/// The attributes of a message of this kind; `None` if it is another one, or cut.
pub(super) fn body(message: &[u8], kind: i32) -> Option<&[u8]> {
    let length = usize::try_from(u32::from_ne_bytes(message.get(..4)?.try_into().ok()?)).ok()?;
    let found = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    message.get(HEADERS..length).filter(|_| found == ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | kind as u16)
}

/// The value of the first attribute of this type; empty if there is none.
pub(super) fn find(mut bytes: &[u8], kind: u16) -> &[u8] {
    while let [a, b, c, d, ..] = *bytes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = bytes.get(4..length) else { break };
        if u16::from_ne_bytes([c, d]) & TYPE == kind {
            return value;
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    &[]
}
