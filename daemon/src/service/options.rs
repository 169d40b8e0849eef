//! The `a{sv}` arguments, by the same rules as files.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxyvpn_dbus::Error;
use proxyvpn_dbus::options::{connect, import};
use zbus::{OwnedVariant, Variant};

use crate::config::check;
use crate::config::error::Rejected;
use crate::config::profile::{Backend, DnsSpec, PasswordSource, Profile, ProtectSpec, Scheme, TunSpec, UpstreamSpec};
use crate::config::url::{self, UpstreamUrl};

/// Name of a connection without a profile.
pub(super) const ADHOC: &str = "adhoc";

/// The options of `Connect`, `Plan` and `Diagnose`, each checked by itself.
#[derive(Debug, Default)]
pub(super) struct ConnectOptions {
    given: bool,
    url: Option<UpstreamUrl>,
    username: Option<String>,
    password: Option<OwnedFd>,
    proxy_ip: Option<Vec<IpAddr>>,
    tun_name: Option<String>,
    tun_cidr: Option<Ipv4Net>,
    tun_cidr6: Option<Ipv6Net>,
    mtu: Option<u16>,
    dns: Option<Vec<IpAddr>>,
    killswitch: Option<bool>,
    lan: Option<Vec<IpNet>>,
    /// Not looked up yet: the user database may be slow.
    bypass_users: Option<Vec<String>>,
    verbose: bool,
}

/// One option, which knows its name in errors.
struct Value<'a> {
    key: &'a str,
    value: Variant<'static>,
}

impl Value<'_> {
    fn bad(&self, cause: impl std::fmt::Display) -> Error {
        Error::InvalidOption(format!("option {}: {cause}", self.key))
    }

    /// As a D-Bus type.
    fn typed<T>(&self, wanted: &str) -> Result<T, Error>
    where
        T: TryFrom<Variant<'static>>,
    {
        let value = self.value.try_clone().map_err(|error| self.bad(error))?;
        T::try_from(value)
            .map_err(|_| self.bad(format!("it has the type {}, not {wanted}", self.value.value_signature())))
    }

    fn text<T>(&self, rule: impl FnOnce(&str) -> Result<T, Rejected>) -> Result<T, Error> {
        rule(&self.typed::<String>("s (string)")?).map_err(|rejected| self.bad(rejected))
    }

    fn flag(&self) -> Result<bool, Error> {
        self.typed("b (boolean)")
    }

    /// A bounded list; what stands in it twice counts once.
    fn list<T: PartialEq>(&self, most: usize, rule: impl Fn(&str) -> Result<T, Rejected>) -> Result<Vec<T>, Error> {
        let texts: Vec<String> = self.typed("as (strings)")?;
        if texts.len() > most {
            return Err(self.bad(format!("it has more than {most} entries")));
        }
        let mut list = Vec::with_capacity(texts.len());
        for text in texts {
            let item = rule(&text).map_err(|rejected| self.bad(rejected))?;
            if !list.contains(&item) {
                list.push(item);
            }
        }
        Ok(list)
    }
}

fn address(text: &str) -> Result<IpAddr, Rejected> {
    text.parse().map_err(|_| Rejected::new(format!("\"{text}\" is not an IP address")))
}

impl ConnectOptions {
    /// Checks every option. An unknown one is an error, so that a misspelt protection is never silently off.
    pub(super) fn parse(options: HashMap<String, OwnedVariant>) -> Result<Self, Error> {
        let mut parsed = Self { given: !options.is_empty(), ..Self::default() };
        for (key, value) in options {
            let value = Value { key: &key, value: value.into() };
            match key.as_str() {
                connect::PROXY_URL => parsed.url = Some(value.text(url::parse)?),
                connect::USERNAME => parsed.username = Some(value.text(check::username)?),
                connect::PASSWORD => {
                    let fd: zbus::Fd<'static> = value.typed("h (file descriptor)")?;
                    parsed.password = Some(zbus::OwnedFd::from(fd).into());
                }
                connect::PROXY_IP => {
                    let rule = |text: &str| check::proxy_address(address(text)?);
                    parsed.proxy_ip = Some(value.list(check::MAX_ADDRESSES, rule)?);
                }
                connect::TUN_NAME => parsed.tun_name = Some(value.text(check::device_name)?),
                connect::TUN_CIDR => parsed.tun_cidr = Some(value.text(check::cidr)?),
                connect::TUN_CIDR6 => parsed.tun_cidr6 = Some(value.text(check::cidr6)?),
                connect::MTU => {
                    let mtu: u32 = value.typed("u (number)")?;
                    parsed.mtu = Some(check::mtu(mtu.into()).map_err(|rejected| value.bad(rejected))?);
                }
                connect::DNS => {
                    let rule = |text: &str| check::resolver(address(text)?);
                    parsed.dns = Some(value.list(check::MAX_RESOLVERS, rule)?);
                }
                connect::KILLSWITCH => parsed.killswitch = Some(value.flag()?),
                connect::LAN => parsed.lan = Some(value.list(check::MAX_LAN, check::lan)?),
                connect::BYPASS_USERS => {
                    parsed.bypass_users = Some(value.list(check::MAX_USERS, |user| Ok(user.to_owned()))?)
                }
                connect::VERBOSE => parsed.verbose = value.flag()?,
                _ => return Err(unknown(&key)),
            }
        }
        Ok(parsed)
    }

    /// Whether the call is ad-hoc.
    pub(super) fn given(&self) -> bool {
        self.given
    }

    /// Whether the call lets the local network go around the tunnel.
    pub(super) fn opens_lan(&self) -> bool {
        self.lan.as_ref().is_some_and(|lan| !lan.is_empty())
    }

    /// Whether debug records are wanted.
    pub(super) fn verbose(&self) -> bool {
        self.verbose
    }

    /// The password's descriptor, once.
    pub(super) fn take_password(&mut self) -> Option<OwnedFd> {
        self.password.take()
    }

    /// `base` with these options laid over it, or a profile of its own without one; `password`: one came along.
    /// Asks the user database.
    pub(super) fn apply(&self, base: Option<Profile>, password: bool) -> Result<Profile, Error> {
        let mut profile = match (base, &self.url) {
            (Some(profile), _) => {
                if !password {
                    self.keep_password_home(&profile)?;
                }
                if profile.backend == Backend::TorVm {
                    self.fit_torvm(&profile)?;
                }
                profile
            }
            (None, Some(_)) => blank(),
            (None, None) => {
                let text = "give the name of a profile, or the option proxy-url with your proxy: http://host:port";
                return Err(Error::InvalidOption(text.to_owned()));
            }
        };
        let upstream = &mut profile.upstream;
        if let Some(url) = &self.url {
            upstream.scheme = url.scheme;
            upstream.host.clone_from(&url.host);
            upstream.port = url.port;
            upstream.username.clone_from(&url.username);
            // Both belong to the proxy that the profile named.
            upstream.password = None;
            upstream.addresses = Vec::new();
        }
        if let Some(username) = &self.username {
            if self.url.as_ref().is_some_and(|url| url.username.is_some()) {
                return Err(invalid(connect::USERNAME, "the user name stands in proxy-url as well; give one of them"));
            }
            upstream.username = Some(username.clone());
        }
        overlay(&mut upstream.addresses, self.proxy_ip.as_ref());
        if upstream.scheme == Scheme::Direct {
            for (key, useless) in [
                (connect::USERNAME, upstream.username.is_some()),
                (connect::PASSWORD, password),
                (connect::PROXY_IP, !upstream.addresses.is_empty()),
            ] {
                if useless {
                    return Err(invalid(key, "direct:// has no proxy to which this could belong"));
                }
            }
        }
        if password && upstream.username.is_none() {
            return Err(invalid(connect::PASSWORD, "a password needs a user name; give username too"));
        }
        if password {
            // Not that of the profile, even when this one is gone: the options may lead to another proxy.
            upstream.password = Some(PasswordSource::Caller);
        }
        profile.fits_upstream().map_err(|rejected| invalid(connect::PROXY_URL, &rejected.to_string()))?;
        overlay(&mut profile.tun.name, self.tun_name.as_ref());
        overlay(&mut profile.tun.cidr, self.tun_cidr.as_ref());
        overlay(&mut profile.tun.cidr6, self.tun_cidr6.as_ref());
        overlay(&mut profile.tun.mtu, self.mtu.as_ref());
        overlay(&mut profile.dns.servers, self.dns.as_ref());
        overlay(&mut profile.protect.killswitch, self.killswitch.as_ref());
        overlay(&mut profile.protect.lan, self.lan.as_ref());
        if let Some(users) = &self.bypass_users {
            profile.bypass_users.clear();
            for user in users {
                let id = check::bypass_user(user)
                    .map_err(|rejected| invalid(connect::BYPASS_USERS, &rejected.to_string()))?;
                if !profile.bypass_users.contains(&id) {
                    profile.bypass_users.push(id);
                }
            }
        }
        Ok(profile)
    }

    /// What the device to the virtual machine cannot have, and whom Tor's own proxy's password must not reach: a proxy in
    /// front of it would see it, and so would who answers for its name.
    fn fit_torvm(&self, base: &Profile) -> Result<(), Error> {
        for (key, given) in [
            (connect::TUN_CIDR, self.tun_cidr.is_some()),
            (connect::TUN_CIDR6, self.tun_cidr6.is_some()),
            (connect::MTU, self.mtu.is_some()),
        ] {
            if given {
                return Err(invalid(key, "the device to the virtual machine has a fixed address and MTU"));
            }
        }
        let Some(proxy) = base.torvm.as_ref().and_then(|torvm| torvm.proxy.as_ref()) else { return Ok(()) };
        let looked_up = proxy.host.parse::<IpAddr>().is_err();
        for (key, redirects) in [
            (connect::PROXY_URL, self.url.is_some()),
            (connect::PROXY_IP, self.proxy_ip.is_some()),
            (connect::DNS, self.dns.is_some() && looked_up),
        ] {
            if redirects && proxy.password.is_some() {
                let text = format!(
                    "with it the password of Tor's proxy in the profile \"{}\" could go to somebody else; change the profile",
                    base.name
                );
                return Err(invalid(key, &text));
            }
        }
        Ok(())
    }

    /// A caller must not make the daemon send a stored password elsewhere: not to another proxy, not to another address, and
    /// not to what a resolver of the caller's choice says.
    fn keep_password_home(&self, base: &Profile) -> Result<(), Error> {
        if base.upstream.password.is_none() {
            return Ok(());
        }
        let looked_up = base.upstream.addresses.is_empty() && base.upstream.host.parse::<IpAddr>().is_err();
        for (key, redirects) in [
            (connect::PROXY_URL, self.url.is_some()),
            (connect::USERNAME, self.username.is_some()),
            (connect::PROXY_IP, self.proxy_ip.is_some()),
            (connect::DNS, self.dns.is_some() && looked_up),
        ] {
            if redirects {
                let text = format!(
                    "with it the password of the profile \"{}\" could go to somebody else; give password too, or change the profile",
                    base.name
                );
                return Err(invalid(key, &text));
            }
        }
        Ok(())
    }
}

fn overlay<T: Clone>(field: &mut T, value: Option<&T>) {
    if let Some(value) = value {
        field.clone_from(value);
    }
}

/// The defaults, without an upstream.
fn blank() -> Profile {
    Profile {
        name: ADHOC.to_owned(),
        backend: Backend::Proxy,
        autoconnect: false,
        upstream: UpstreamSpec {
            scheme: Scheme::Direct,
            host: String::new(),
            port: 0,
            addresses: Vec::new(),
            username: None,
            password: None,
        },
        tun: TunSpec::default(),
        dns: DnsSpec::default(),
        protect: ProtectSpec::default(),
        bypass_users: Vec::new(),
        torvm: None,
    }
}

fn invalid(key: &str, cause: &str) -> Error {
    Error::InvalidOption(format!("option {key}: {cause}"))
}

fn unknown(key: &str) -> Error {
    let key: String = key.chars().take(64).flat_map(char::escape_default).collect();
    Error::InvalidOption(format!("there is no option \"{key}\" here; docs/dbus.md lists them"))
}

/// The options of `ImportProfile`: name and whether to replace.
pub(super) fn import(options: HashMap<String, OwnedVariant>) -> Result<(String, bool), Error> {
    let (mut name, mut replace) = (None, false);
    for (key, value) in options {
        let value = Value { key: &key, value: value.into() };
        match key.as_str() {
            import::NAME => {
                name = Some(value.text(|name| check::profile_name(name).map(|()| name.to_owned()))?);
            }
            import::REPLACE => replace = value.flag()?,
            _ => return Err(unknown(&key)),
        }
    }
    let name = name.ok_or_else(|| invalid(import::NAME, "it is missing; give the name of the profile"))?;
    Ok((name, replace))
}

/// The options of `Disconnect`: there are none yet.
pub(super) fn none(options: &HashMap<String, OwnedVariant>) -> Result<(), Error> {
    options.keys().next().map_or(Ok(()), |key| Err(unknown(key)))
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
