//! `[torvm]`, and what the other sections may say with it.

use proxyvpn_torvm::config::proxy::{Kind, User};
use proxyvpn_torvm::config::{
    Country, DirAuthority, Entry, List, LogLevel, MAX_BRIDGES, MAX_NODES, Network, Node, TorSettings, Transport,
    network,
};
use proxyvpn_torvm::launch::Accelerator;
use proxyvpn_torvm::link;
use toml::Spanned;

use ipnet::Ipv4Net;

use super::check;
use super::error::{ConfigError, Rejected};
use super::parse::Reader;
use super::profile::{TorProxySpec, TorVmSpec, TunSpec};
use super::raw::{self, Text};

/// The TAP device's name unless `[tun] name` says otherwise.
pub(super) const DEVICE: &str = "torvm0";

impl Reader<'_> {
    /// Keys that mean nothing with a virtual machine are errors: who wrote them expects something of them.
    pub(super) fn unlike_proxy(&self, raw: &raw::Profile) -> Result<(), ConfigError> {
        let tun = &raw.tun;
        let fixed = [
            tun.cidr.as_ref().map(Spanned::span),
            tun.cidr6.as_ref().map(Spanned::span),
            tun.mtu.as_ref().map(Spanned::span),
        ];
        if let Some(span) = fixed.into_iter().flatten().next() {
            let text = "the device to the virtual machine has a fixed address (10.10.10.2/30), no IPv6 and a fixed MTU; remove this key";
            return Err(self.fault(span, text));
        }
        if let Some(mode) = &raw.dns.mode {
            return Err(self.fault(mode.span(), "with backend = \"torvm\" all names go through Tor; remove mode"));
        }
        if let Some(forward) = raw.protect.forward.as_ref().filter(|forward| forward.get_ref() == "tunnel") {
            let text = "with backend = \"torvm\" nothing is forwarded in this version; use \"block\"";
            return Err(self.fault(forward.span(), text));
        }
        Ok(())
    }

    /// `[tun]` for the TAP device.
    pub(super) fn tap(&self, raw: &raw::Tun) -> Result<TunSpec, ConfigError> {
        let name = raw.name.as_ref().map(|name| self.value(name, |name| check::device_name(name))).transpose()?;
        Ok(TunSpec {
            name: name.unwrap_or_else(|| DEVICE.to_owned()),
            cidr: Ipv4Net::new_assert(link::HOST, link::PREFIX),
            mtu: link::HOST_MTU,
            ..TunSpec::default()
        })
    }

    pub(super) fn torvm(&self, raw: &raw::TorVm) -> Result<TorVmSpec, ConfigError> {
        let default = TorVmSpec::default();
        let memory = raw.memory_mib.as_ref().map(|memory| {
            self.value(memory, |&memory| {
                u32::try_from(memory).ok().filter(|memory| (128..=4096).contains(memory)).ok_or_else(|| {
                    Rejected::new(format!("the virtual machine cannot have {memory} MiB; use 128 to 4096"))
                })
            })
        });
        let accel = [("auto", None), ("kvm", Some(Accelerator::Kvm)), ("tcg", Some(Accelerator::Tcg))];
        let accel = accel.map(|(word, accel)| (word, Some(accel)));
        let (tor, proxy) = (self.tor(raw)?, self.tor_proxy(raw)?);
        if let Some(place) = raw.https_proxy.as_ref().or(raw.socks5_proxy.as_ref()).filter(|_| tor.udp()) {
            let text =
                "snowflake needs UDP, which goes through no proxy; use obfs4 or meek bridges, or remove this key";
            return Err(self.fault(place.span(), text));
        }
        Ok(TorVmSpec {
            memory_mib: memory.transpose()?.unwrap_or(default.memory_mib),
            accel: self.one_of(raw.accel.as_ref(), "accel", &accel, default.accel)?,
            tor,
            proxy,
        })
    }

    fn tor(&self, raw: &raw::TorVm) -> Result<TorSettings, ConfigError> {
        let mut exit_nodes = self.nodes(&raw.exit_nodes, "exit-nodes")?;
        if let Some(country) = raw.exit_country.as_ref().filter(|country| !country.get_ref().is_empty()) {
            let country: Country = self.value(country, |country| Ok(country.parse()?))?;
            exit_nodes.push(Node::Country(country));
        }
        let log = [("warn", Some(LogLevel::Warn)), ("notice", Some(LogLevel::Notice)), ("info", Some(LogLevel::Info))];
        Ok(TorSettings {
            entry: self.entry(raw)?,
            exit_nodes: self.bounded(raw.exit_country.as_ref(), exit_nodes)?,
            exclude_nodes: self.bounded(None, self.nodes(&raw.exclude_nodes, "exclude-nodes")?)?,
            exclude_exit_nodes: self.bounded(None, self.nodes(&raw.exclude_exit_nodes, "exclude-exit-nodes")?)?,
            strict_nodes: raw.strict_nodes,
            network: self.network(raw)?,
            log: self.one_of(raw.tor_log.as_ref(), "tor-log", &log, LogLevel::default())?,
        })
    }

    fn nodes(&self, nodes: &[Text], key: &str) -> Result<Vec<Node>, ConfigError> {
        self.list(nodes, key, MAX_NODES, |node| Ok(node.parse()?))
    }

    fn bounded<T, const MOST: usize>(
        &self,
        place: Option<&Text>,
        values: Vec<T>,
    ) -> Result<List<T, MOST>, ConfigError> {
        List::try_from(values).map_err(|rejected| self.fault(place.map_or(0..0, Spanned::span), rejected.0))
    }

    fn entry(&self, raw: &raw::TorVm) -> Result<Entry, ConfigError> {
        let transport = raw.transport.as_ref();
        let wanted = transport.map(|word| self.value(word, |word| Ok(word.parse::<Transport>()?))).transpose()?;
        let bridges = self.list(&raw.bridges, "bridges", MAX_BRIDGES, |line| {
            let bridge: proxyvpn_torvm::config::Bridge = line.parse()?;
            match wanted {
                Some(wanted) if wanted != bridge.transport() => Err(Rejected::new(format!(
                    "this bridge is reached by {}, but transport = \"{wanted}\"; make them the same",
                    match bridge.transport() {
                        Transport::None => "no transport".to_owned(),
                        transport => format!("the transport {transport}"),
                    }
                ))),
                _ if bridge.name().is_none() && bridge.address().is_ipv6() => Err(Rejected::new(
                    "the virtual machine's way out carries IPv4 only; use a bridge with an IPv4 address",
                )),
                _ => Ok(bridge),
            }
        })?;
        match (bridges.is_empty(), raw.entry_nodes.first()) {
            (false, Some(node)) => Err(self
                .fault(node.span(), "with bridges every circuit begins at one of them; remove entry-nodes or bridges")),
            (false, None) => self.bounded(None, bridges).map(Entry::Bridges),
            (true, _) => match (transport, wanted) {
                (Some(word), Some(wanted)) if wanted != Transport::None => {
                    let text = format!(
                        "transport = \"{wanted}\" needs bridges, as bridges.torproject.org gives them; add bridges = [\"…\"]"
                    );
                    Err(self.fault(word.span(), text))
                }
                _ if raw.entry_nodes.is_empty() => Ok(Entry::Any),
                _ => self.bounded(None, self.nodes(&raw.entry_nodes, "entry-nodes")?).map(Entry::Nodes),
            },
        }
    }

    fn network(&self, raw: &raw::TorVm) -> Result<Option<Network>, ConfigError> {
        let authorities: Vec<DirAuthority> =
            self.list(&raw.directory_authorities, "directory-authorities", network::MAX_AUTHORITIES, |line| {
                Ok(line.parse()?)
            })?;
        match (&raw.testing, authorities.is_empty()) {
            (Some(testing), true) if *testing.get_ref() => Err(self
                .fault(testing.span(), "a network for tests needs directory-authorities; add them, or remove testing")),
            (_, true) => Ok(None),
            (testing, false) => {
                let testing = testing.as_ref().is_some_and(|testing| *testing.get_ref());
                Ok(Some(Network { authorities: self.bounded(None, authorities)?, testing }))
            }
        }
    }

    fn tor_proxy(&self, raw: &raw::TorVm) -> Result<Option<TorProxySpec>, ConfigError> {
        let (file, credential) = (raw.proxy_password_file.as_ref(), raw.proxy_password_credential.as_ref());
        let username = raw.proxy_username.as_ref().filter(|name| !name.get_ref().is_empty());
        let (text, kind) = match (&raw.https_proxy, &raw.socks5_proxy) {
            (Some(https), Some(socks5)) => {
                let later = if https.span().start > socks5.span().start { https } else { socks5 };
                return Err(self.fault(later.span(), "https-proxy and socks5-proxy exclude each other; keep one"));
            }
            (Some(https), None) => (https, Kind::Https),
            (None, Some(socks5)) => (socks5, Kind::Socks5),
            (None, None) => {
                return match username.or(file).or(credential) {
                    Some(useless) => Err(self.fault(
                        useless.span(),
                        "there is no proxy to which this could belong; add https-proxy or socks5-proxy",
                    )),
                    None => Ok(None),
                };
            }
        };
        let (host, port) = self.value(text, |text| tor_proxy(text))?;
        let password = self.password(file, credential, "proxy-")?;
        let user = username
            .map(|name| self.value(name, |name| Ok(String::from(User::try_from(name.clone())?))))
            .transpose()?;
        match (&user, &password) {
            (None, Some(_)) => {
                let place = file.or(credential).map_or(0..0, Spanned::span);
                Err(self.fault(place, "a password needs a user name; add proxy-username = \"name\""))
            }
            // Tor sends an empty password to neither kind of proxy.
            (Some(_), None) => {
                let place = username.map_or(0..0, Spanned::span);
                Err(self
                    .fault(place, "Tor sends a user name only with a password; add proxy-password-file = \"/path\""))
            }
            _ => Ok(Some(TorProxySpec { kind, host, port, username: user, password })),
        }
    }
}

/// `host:port`.
fn tor_proxy(text: &str) -> Result<(String, u16), Rejected> {
    if text.contains(['@', '/']) {
        // Not repeated: somebody may have written a password there.
        return Err(Rejected::new("write Tor's proxy as host:port; user and password have keys of their own"));
    }
    let (host, port) =
        text.rsplit_once(':').ok_or_else(|| Rejected::new("the port is missing; write Tor's proxy as host:port"))?;
    if host.contains(':') {
        return Err(Rejected::new("the virtual machine's way out carries IPv4 only; use a proxy with an IPv4 address"));
    }
    Ok((check::host(host)?, check::port(port)?))
}

#[cfg(test)]
#[path = "torvm_tests.rs"]
mod tests;
