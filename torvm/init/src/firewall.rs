//! The ruleset. From the host's side: TCP into Tor's transparent proxy, DNS into its resolver, all else refused. To the other side: only
//! TCP that Tor's user began, and for snowflake its UDP. Nothing is forwarded.

use proxyvpn_torvm::link::{CONTROL_PORT, DNS_PORT, GUEST, HOST, SOCKS_PORT, TRANS_PORT, UPLINK_GUEST};

use crate::error::Error;
use crate::network::{HOST_DEVICE, UPLINK_DEVICE};
use crate::program;
use crate::tor;

const NFT: &str = "/usr/bin/nft";

/// Puts it in force, in one transaction. `udp`: whether Tor's user may send it.
pub(crate) fn apply(udp: bool) -> Result<(), Error> {
    program::run(NFT, &["-f", "-"], &ruleset(udp), || {})?.successful(NFT)
}

/// TCP port 53 is reset: exits would ask another resolver, which knows no `.onion` names, while programs that are refused ask by UDP.
fn ruleset(udp: bool) -> String {
    // Not from the other device's address, which WebRTC tries too; neither names nor groups (mDNS).
    let udp = if udp {
        format!(
            r#"oifname "{UPLINK_DEVICE}" ip saddr {UPLINK_GUEST} ip daddr != {{ 224.0.0.0/4, 255.255.255.255 }} udp dport != 53 meta skuid {} accept"#,
            tor::UID
        )
    } else {
        String::new()
    };
    format!(
        r#"table inet torvm {{
  chain refuse {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != "{HOST_DEVICE}" accept
    tcp dport 53 reject with tcp reset
    meta l4proto tcp accept
    udp dport {{ 53, {DNS_PORT} }} accept
    meta l4proto icmp ct state established,related accept
    reject with icmpx type port-unreachable
  }}
  chain steer {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname != "{HOST_DEVICE}" accept
    ip daddr {GUEST} tcp dport {{ {SOCKS_PORT}, {CONTROL_PORT}, {TRANS_PORT} }} accept
    meta nfproto ipv4 udp dport 53 redirect to :{DNS_PORT}
    meta nfproto ipv4 meta l4proto tcp redirect to :{TRANS_PORT}
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    iifname "{HOST_DEVICE}" ip saddr {HOST} ip daddr {GUEST} tcp dport {{ {SOCKS_PORT}, {CONTROL_PORT}, {TRANS_PORT} }} ct state new accept
    iifname "{HOST_DEVICE}" ip saddr {HOST} ip daddr {GUEST} udp dport {DNS_PORT} ct state new accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
  }}
  chain output {{
    type filter hook output priority filter; policy drop;
    oifname "lo" accept
    oifname "{HOST_DEVICE}" ct direction reply accept
    oifname "{UPLINK_DEVICE}" meta l4proto tcp ct state established accept
    oifname "{UPLINK_DEVICE}" meta l4proto tcp meta skuid {uid} ct state new accept
    {udp}
    reject with icmpx type admin-prohibited
  }}
}}
"#,
        uid = tor::UID
    )
}
