//! Tor's configuration, from fields that each were checked. No text of the configuration reaches it by another way.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use crate::config::node::Node;
use crate::config::proxy::{Kind, Proxy};
use crate::config::{Bridge, Entry, GuestConfig, TorSettings};
use crate::link::{CONTROL_PORT, DNS_PORT, GUEST, ONION_NETWORK, SOCKS_PORT, TRANS_PORT};

/// Where the guest has the countries of IPv4 addresses; Tor knows a relay's country by no other. Not where Tor looks unasked: it takes a
/// second to read, and is only needed when the profile names a country.
pub const GEOIP: &str = "/usr/share/torvm/geoip";

/// Writes it. `state`: Tor's directory.
#[must_use]
pub fn render(config: &GuestConfig, state: &str) -> String {
    let mut torrc = Torrc(String::new());
    let (network, prefix) = ONION_NETWORK;
    torrc.set("DataDirectory", state);
    torrc.set("SocksPort", format_args!("{GUEST}:{SOCKS_PORT} IsolateSOCKSAuth IsolateDestAddr"));
    torrc.set("TransPort", format_args!("{GUEST}:{TRANS_PORT}"));
    torrc.set("DNSPort", format_args!("{GUEST}:{DNS_PORT}"));
    torrc.set("ControlPort", format_args!("{GUEST}:{CONTROL_PORT}"));
    torrc.set("HashedControlPassword", config.control_password.as_ref());
    torrc.set("AutomapHostsOnResolve", 1);
    torrc.set("VirtualAddrNetworkIPv4", format_args!("{network}/{prefix}"));
    torrc.set("ClientRejectInternalAddresses", 1);
    torrc.set("ClientOnly", 1);
    // The way out carries IPv4 alone.
    torrc.set("ClientUseIPv6", 0);
    torrc.set("AvoidDiskWrites", 1);
    // Without this, a Tor that slept when the machine was switched off would sleep on, and never get to 100 %.
    torrc.set("DormantCanceledByStartup", 1);
    torrc.set("SafeLogging", 1);
    torrc.set("Log", format_args!("{} stdout", config.tor.log));
    tor(&mut torrc, &config.tor);
    if let Some(proxy) = &config.proxy {
        via(&mut torrc, proxy);
    }
    torrc.0
}

struct Torrc(String);

impl Torrc {
    fn set(&mut self, key: &str, value: impl fmt::Display) {
        // A String takes everything.
        let _ = writeln!(self.0, "{key} {value}");
    }
}

fn tor(torrc: &mut Torrc, tor: &TorSettings) {
    let mut programs: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for transport in tor.bridges().iter().map(Bridge::transport) {
        if let (Some(program), Some(plugin)) = (transport.program(), transport.plugin()) {
            programs.entry(program).or_default().insert(plugin);
        }
    }
    if programs.is_empty() {
        torrc.set("NoExec", 1);
        // Tor's own filter of system calls; it knows no starting of transports.
        torrc.set("Sandbox", 1);
    }
    for (program, plugins) in programs {
        let plugins = plugins.into_iter().collect::<Vec<_>>().join(",");
        torrc.set("ClientTransportPlugin", format_args!("{plugins} exec {program}"));
    }
    let mut lists = vec![
        ("ExitNodes", &tor.exit_nodes),
        ("ExcludeNodes", &tor.exclude_nodes),
        ("ExcludeExitNodes", &tor.exclude_exit_nodes),
    ];
    match &tor.entry {
        Entry::Any => {}
        Entry::Nodes(nodes) => lists.push(("EntryNodes", nodes)),
        Entry::Bridges(bridges) => {
            torrc.set("UseBridges", 1);
            bridges.iter().for_each(|bridge| torrc.set("Bridge", bridge));
        }
    }
    for (key, nodes) in &lists {
        if !nodes.is_empty() {
            torrc.set(key, nodes.iter().map(Node::to_string).collect::<Vec<_>>().join(","));
        }
    }
    if tor.strict_nodes {
        torrc.set("StrictNodes", 1);
    }
    if lists.iter().any(|(_, nodes)| nodes.iter().any(|node| matches!(node, Node::Country(_)))) {
        torrc.set("GeoIPFile", GEOIP);
    }
    if let Some(network) = &tor.network {
        if network.testing {
            torrc.set("TestingTorNetwork", 1);
        }
        network.authorities.iter().for_each(|authority| torrc.set("DirAuthority", authority));
    }
}

fn via(torrc: &mut Torrc, proxy: &Proxy) {
    let login = proxy.login.as_ref().map(|login| (login.user.as_ref(), login.password.expose()));
    match proxy.kind {
        Kind::Https => {
            torrc.set("HTTPSProxy", proxy.address);
            if let Some((user, password)) = login {
                torrc.set("HTTPSProxyAuthenticator", Quoted(&[user, ":", password]));
            }
        }
        Kind::Socks5 => {
            torrc.set("Socks5Proxy", proxy.address);
            if let Some((user, password)) = login {
                torrc.set("Socks5ProxyUsername", Quoted(&[user]));
                torrc.set("Socks5ProxyPassword", Quoted(&[password]));
            }
        }
    }
}

/// Free text in Tor's quotes, every byte that could mean something to its parser as `\xHH`.
struct Quoted<'a>(&'a [&'a str]);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for byte in self.0.iter().flat_map(|part| part.bytes()) {
            if byte.is_ascii_alphanumeric() { f.write_char(char::from(byte))? } else { write!(f, "\\x{byte:02x}")? }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
#[path = "torrc_tests.rs"]
mod tests;
