//! Rules to expressions of nf_tables, as nft itself compiles them (`nft --debug=netlink`).

use std::net::IpAddr;

use ipnet::IpNet;
use nftnl::nftnl_sys::{self as nf, libc};

use super::{
    sys::{Expr, Value},
    timeout,
};
use crate::net::{
    desired::{MARK, PASSED},
    firewall::rules::{Action, Family, Match, Protocol, Rule},
};

/// `NFT_FIB_RESULT_ADDRTYPE` and `NFTA_FIB_F_DADDR` (linux/netfilter/nf_tables.h).
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_F_DADDR: u32 = 1 << 1;
/// `RTN_LOCAL` (rtnetlink(7)).
const RTN_LOCAL: u32 = 2;
/// `NF_CT_STATE_BIT(IP_CT_NEW)` and `IP_CT_DIR_REPLY` (linux/netfilter/nf_conntrack_common.h).
const CT_STATE_NEW: u32 = 8;
const CT_DIR_REPLY: u8 = 1;
/// TCP flags (RFC 9293).
const SYN: u8 = 0x02;
const FIN_SYN_RST_ACK: u8 = 0x17;
/// `ETH_P_ARP` (linux/if_ether.h).
const ARP: u16 = 0x0806;
/// Size of a device name, with NUL.
const IFNAMSIZ: usize = 16;

const EQUAL: i32 = libc::NFT_CMP_EQ;
const DIFFERENT: i32 = libc::NFT_CMP_NEQ;

/// The expressions of one rule, in order. The first that does not match ends it. `egress`: it is about frames, at the exit
/// of a device.
pub(super) fn rule(rule: &Rule, egress: bool) -> Vec<Expr> {
    let mut list = vec![];
    // What the header fields below rest on: IP version and protocol, each once and first.
    if let Some(family) = rule.family() {
        let (family, kind) = match family {
            Family::V4 => (libc::NFPROTO_IPV4, libc::ETH_P_IP),
            Family::V6 => (libc::NFPROTO_IPV6, libc::ETH_P_IPV6),
        };
        if egress {
            list.extend(ether_type(u16::try_from(kind).unwrap_or_default()));
        } else {
            list.extend([meta(libc::NFT_META_NFPROTO), cmp(EQUAL, &[low_byte(family)])]);
        }
    }
    if let Some(protocol) = rule.protocol() {
        let protocol = match protocol {
            Protocol::Tcp => libc::IPPROTO_TCP,
            Protocol::Udp => libc::IPPROTO_UDP,
            Protocol::Icmp => libc::IPPROTO_ICMP,
            Protocol::Icmp6 => libc::IPPROTO_ICMPV6,
        };
        list.extend([meta(libc::NFT_META_L4PROTO), cmp(EQUAL, &[low_byte(protocol)])]);
    }
    for m in &rule.matches {
        condition(m, &mut list);
    }
    action(rule.action, &mut list);
    list
}

fn condition(m: &Match, list: &mut Vec<Expr>) {
    match m {
        // Stated in front already.
        Match::Family(_) | Match::Protocol(_) => {}
        Match::Iif(name) => list.extend([meta(libc::NFT_META_IIFNAME), cmp(EQUAL, &device(name))]),
        Match::Oif(name) => list.extend([meta(libc::NFT_META_OIFNAME), cmp(EQUAL, &device(name))]),
        Match::Mark => list.extend([meta(libc::NFT_META_MARK), cmp(EQUAL, &MARK.to_ne_bytes())]),
        Match::Passed => list.extend([meta(libc::NFT_META_MARK), cmp(EQUAL, &PASSED.to_ne_bytes())]),
        Match::User(uid) => list.extend([meta(libc::NFT_META_SKUID), cmp(EQUAL, &uid.to_ne_bytes())]),
        Match::CtMark(mark) => list.extend([ct(libc::NFT_CT_MARK), cmp(EQUAL, &mark.to_ne_bytes())]),
        Match::CtReply => list.extend([ct(libc::NFT_CT_DIRECTION), cmp(EQUAL, &[CT_DIR_REPLY])]),
        Match::CtNew => list.extend([
            ct(libc::NFT_CT_STATE),
            mask(&CT_STATE_NEW.to_ne_bytes()),
            cmp(DIFFERENT, &0u32.to_ne_bytes()),
        ]),
        Match::ToLocal => list.extend([
            Expr::new(
                c"fib",
                [
                    (nf::NFTNL_EXPR_FIB_RESULT, Value::U32(FIB_RESULT_ADDRTYPE)),
                    (nf::NFTNL_EXPR_FIB_FLAGS, Value::U32(FIB_F_DADDR)),
                    (nf::NFTNL_EXPR_FIB_DREG, REGISTER),
                ],
            ),
            cmp(EQUAL, &RTN_LOCAL.to_ne_bytes()),
        ]),
        Match::Syn => list.extend([payload(Header::Transport, 13, 1), mask(&[FIN_SYN_RST_ACK]), cmp(EQUAL, &[SYN])]),
        Match::NotSyn => {
            list.extend([payload(Header::Transport, 13, 1), mask(&[FIN_SYN_RST_ACK]), cmp(DIFFERENT, &[SYN])]);
        }
        Match::Source(net) => address(net, 12, 8, list),
        Match::Destination(net) => address(net, 16, 24, list),
        Match::SourcePort(_, port) => list.extend([payload(Header::Transport, 0, 2), cmp(EQUAL, &port.to_be_bytes())]),
        Match::DestinationPort(_, port) => {
            list.extend([payload(Header::Transport, 2, 2), cmp(EQUAL, &port.to_be_bytes())]);
        }
        Match::IcmpType(kind) | Match::Icmp6Type(kind) => {
            list.extend([payload(Header::Transport, 0, 1), cmp(EQUAL, &[*kind])]);
        }
        Match::HopLimit(limit) => list.extend([payload(Header::Network, 7, 1), cmp(EQUAL, &[*limit])]),
        Match::NdTarget(address) => list.extend([payload(Header::Transport, 8, 16), cmp(EQUAL, &address.octets())]),
        Match::EtherType(kind) => list.extend(ether_type(*kind)),
        // Behind types, lengths, operation and the sender's link address (RFC 826).
        Match::ArpSender(address) => {
            list.extend(ether_type(ARP));
            list.extend([payload(Header::Network, 14, 4), cmp(EQUAL, &address.octets())]);
        }
    }
}

fn action(action: Action, list: &mut Vec<Expr>) {
    match action {
        Action::SetMark(mark) => list.extend(set_mark(mark)),
        Action::Pass => {
            list.extend(set_mark(PASSED));
            list.push(verdict(libc::NF_ACCEPT));
        }
        Action::SetCtMark(mark) => list.extend([
            immediate(mark),
            Expr::new(
                c"ct",
                [(nf::NFTNL_EXPR_CT_KEY, Value::U32(constant(libc::NFT_CT_MARK))), (nf::NFTNL_EXPR_CT_SREG, REGISTER)],
            ),
        ]),
        Action::SetTimeout(name) => list.push(Expr::new(
            c"objref",
            [
                (nf::NFTNL_EXPR_OBJREF_IMM_TYPE, Value::U32(timeout::KIND)),
                (nf::NFTNL_EXPR_OBJREF_IMM_NAME, Value::Data([name.as_bytes(), &[0]].concat())),
            ],
        )),
        Action::Accept => list.push(verdict(libc::NF_ACCEPT)),
        Action::Drop => list.extend([Expr::new(c"counter", []), verdict(libc::NF_DROP)]),
        Action::RejectReset => list.push(reject(libc::NFT_REJECT_TCP_RST, 0)),
        Action::RejectPort => {
            list.push(reject(libc::NFT_REJECT_ICMPX_UNREACH, low_byte(libc::NFT_REJECT_ICMPX_PORT_UNREACH)));
        }
        Action::RejectProhibited => {
            list.push(reject(libc::NFT_REJECT_ICMPX_UNREACH, low_byte(libc::NFT_REJECT_ICMPX_ADMIN_PROHIBITED)));
        }
    }
}

/// The only data register that is needed: each comparison follows its load.
const REGISTER: Value = Value::U32(1);

enum Header {
    Network,
    Transport,
}

fn address(net: &IpNet, offset4: u32, offset6: u32, list: &mut Vec<Expr>) {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let value = bytes(net.network());
    let (offset, length) = if net.addr().is_ipv4() { (offset4, 4) } else { (offset6, 16) };
    list.push(payload(Header::Network, offset, length));
    if net.prefix_len() != net.max_prefix_len() {
        list.push(mask(&bytes(net.netmask())));
    }
    list.push(cmp(EQUAL, &value));
}

fn meta(key: i32) -> Expr {
    Expr::new(c"meta", [(nf::NFTNL_EXPR_META_KEY, Value::U32(constant(key))), (nf::NFTNL_EXPR_META_DREG, REGISTER)])
}

fn set_mark(mark: u32) -> [Expr; 2] {
    let key = (nf::NFTNL_EXPR_META_KEY, Value::U32(constant(libc::NFT_META_MARK)));
    [immediate(mark), Expr::new(c"meta", [key, (nf::NFTNL_EXPR_META_SREG, REGISTER)])]
}

fn ether_type(kind: u16) -> [Expr; 2] {
    [meta(libc::NFT_META_PROTOCOL), cmp(EQUAL, &kind.to_be_bytes())]
}

fn ct(key: i32) -> Expr {
    Expr::new(c"ct", [(nf::NFTNL_EXPR_CT_KEY, Value::U32(constant(key))), (nf::NFTNL_EXPR_CT_DREG, REGISTER)])
}

fn cmp(op: i32, data: &[u8]) -> Expr {
    Expr::new(
        c"cmp",
        [
            (nf::NFTNL_EXPR_CMP_SREG, REGISTER),
            (nf::NFTNL_EXPR_CMP_OP, Value::U32(constant(op))),
            (nf::NFTNL_EXPR_CMP_DATA, Value::Data(data.to_vec())),
        ],
    )
}

fn mask(bytes: &[u8]) -> Expr {
    Expr::new(
        c"bitwise",
        [
            (nf::NFTNL_EXPR_BITWISE_SREG, REGISTER),
            (nf::NFTNL_EXPR_BITWISE_DREG, REGISTER),
            (nf::NFTNL_EXPR_BITWISE_LEN, Value::U32(u32::try_from(bytes.len()).unwrap_or(0))),
            (nf::NFTNL_EXPR_BITWISE_MASK, Value::Data(bytes.to_vec())),
            (nf::NFTNL_EXPR_BITWISE_XOR, Value::Data(vec![0; bytes.len()])),
        ],
    )
}

fn payload(header: Header, offset: u32, length: u32) -> Expr {
    let base = match header {
        Header::Network => libc::NFT_PAYLOAD_NETWORK_HEADER,
        Header::Transport => libc::NFT_PAYLOAD_TRANSPORT_HEADER,
    };
    Expr::new(
        c"payload",
        [
            (nf::NFTNL_EXPR_PAYLOAD_DREG, REGISTER),
            (nf::NFTNL_EXPR_PAYLOAD_BASE, Value::U32(constant(base))),
            (nf::NFTNL_EXPR_PAYLOAD_OFFSET, Value::U32(offset)),
            (nf::NFTNL_EXPR_PAYLOAD_LEN, Value::U32(length)),
        ],
    )
}

fn immediate(value: u32) -> Expr {
    Expr::new(
        c"immediate",
        [(nf::NFTNL_EXPR_IMM_DREG, REGISTER), (nf::NFTNL_EXPR_IMM_DATA, Value::Data(value.to_ne_bytes().to_vec()))],
    )
}

fn verdict(code: i32) -> Expr {
    Expr::new(
        c"immediate",
        [
            (nf::NFTNL_EXPR_IMM_DREG, Value::U32(constant(libc::NFT_REG_VERDICT))),
            (nf::NFTNL_EXPR_IMM_VERDICT, Value::U32(constant(code))),
        ],
    )
}

fn reject(kind: i32, code: u8) -> Expr {
    Expr::new(
        c"reject",
        [(nf::NFTNL_EXPR_REJECT_TYPE, Value::U32(constant(kind))), (nf::NFTNL_EXPR_REJECT_CODE, Value::U8(code))],
    )
}

/// A device name as the kernel compares it: padded with NUL.
fn device(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

/// libc has the kernel's unsigned constants as `i32`; none is negative.
fn constant(value: i32) -> u32 {
    value.unsigned_abs()
}

/// A constant that fits in a byte.
fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}
