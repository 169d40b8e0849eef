//! TOML text to a checked profile.

use std::ops::Range;
use std::path::PathBuf;

use toml::Spanned;

use super::error::{ConfigError, Rejected, Source};
use super::profile::{
    Backend, DnsSpec, ForwardSpec, PasswordSource, Profile, ProtectSpec, Scheme, TunSpec, UpstreamSpec,
};
use super::raw::{self, Text};
use super::{check, secret, url};

/// Reads a profile. `file` is what messages call the text.
///
/// # Errors
/// The first thing that is wrong, with its line and column.
pub fn profile(name: &str, file: &str, text: &str) -> Result<Profile, ConfigError> {
    let source = Source { file, text };
    check::profile_name(name).map_err(|rejected| source.error(None, rejected))?;
    let raw: raw::Profile = source.parse()?;
    let reader = Reader(source);
    let backend = reader.one_of(
        raw.backend.as_ref(),
        "backend",
        &[("proxy", Some(Backend::Proxy)), ("torvm", Some(Backend::TorVm))],
        Backend::Proxy,
    )?;
    if let (Backend::Proxy, Some(section)) = (backend, &raw.torvm) {
        return Err(reader.0.error(
            Some(section.span()),
            Rejected::new("[torvm] belongs to backend = \"torvm\"; write that, or remove the section"),
        ));
    }
    let (tun, dns, protect, torvm) = match backend {
        Backend::Proxy => (reader.tun(&raw.tun)?, reader.dns(&raw.dns)?, reader.protect(&raw.protect)?, None),
        Backend::TorVm => {
            reader.unlike_proxy(&raw)?;
            let section = raw.torvm.map(Spanned::into_inner).unwrap_or_default();
            let torvm = Some(reader.torvm(&section)?);
            (reader.tap(&raw.tun)?, reader.dns(&raw.dns)?, reader.protect(&raw.protect)?, torvm)
        }
    };
    let url = raw.upstream.as_ref().and_then(|upstream| upstream.get_ref().url.as_ref()).map(Spanned::span);
    let profile = Profile {
        name: name.to_owned(),
        backend,
        autoconnect: raw.autoconnect,
        upstream: reader.upstream(backend, raw.upstream)?,
        tun,
        dns,
        protect,
        bypass_users: reader.list(&raw.bypass.users, "users", check::MAX_USERS, |value| match value {
            toml::Value::String(name) => check::bypass_user(name),
            toml::Value::Integer(id) => check::bypass_user(&id.to_string()),
            _ => Err(Rejected::new("a user is a name or a number")),
        })?,
        torvm,
    };
    profile.fits_upstream().map_err(|rejected| reader.0.error(url, rejected))?;
    Ok(profile)
}

/// Checks values and puts their places into errors.
pub(super) struct Reader<'a>(Source<'a>);

impl Reader<'_> {
    /// One value through one rule.
    pub(super) fn value<V, T>(
        &self,
        value: &Spanned<V>,
        rule: impl FnOnce(&V) -> Result<T, Rejected>,
    ) -> Result<T, ConfigError> {
        rule(value.as_ref()).map_err(|rejected| self.0.error(Some(value.span()), rejected))
    }

    /// A bounded list; what stands in it twice counts once.
    pub(super) fn list<V, T: PartialEq>(
        &self,
        values: &[Spanned<V>],
        key: &str,
        most: usize,
        rule: impl Fn(&V) -> Result<T, Rejected>,
    ) -> Result<Vec<T>, ConfigError> {
        if let Some(over) = values.get(most) {
            return Err(self.fault(over.span(), format!("{key} has more than {most} entries")));
        }
        let mut list = Vec::with_capacity(values.len());
        for value in values {
            let item = self.value(value, &rule)?;
            if !list.contains(&item) {
                list.push(item);
            }
        }
        Ok(list)
    }

    /// A word from a list; `None` there is a word of a later version.
    pub(super) fn one_of<T: Copy>(
        &self,
        value: Option<&Text>,
        key: &str,
        words: &[(&str, Option<T>)],
        default: T,
    ) -> Result<T, ConfigError> {
        let Some(value) = value else { return Ok(default) };
        let usable = || {
            let usable = words.iter().filter(|(_, value)| value.is_some());
            usable.map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ")
        };
        match words.iter().find(|(word, _)| word == value.get_ref()) {
            Some((_, Some(found))) => Ok(*found),
            Some((word, None)) => {
                Err(self.fault(value.span(), format!("{key} = \"{word}\" is not in this version; use {}", usable())))
            }
            None => Err(self.fault(value.span(), format!("\"{}\" is no {key}; use {}", value.get_ref(), usable()))),
        }
    }

    pub(super) fn fault(&self, span: Range<usize>, message: impl AsRef<str>) -> ConfigError {
        self.0.error(Some(span), Rejected::new(message))
    }

    fn upstream(&self, backend: Backend, raw: Option<Spanned<raw::Upstream>>) -> Result<UpstreamSpec, ConfigError> {
        let section = raw.as_ref().map(Spanned::span);
        let raw = raw.map(Spanned::into_inner).unwrap_or_default();
        let url = match (&raw.url, backend) {
            (Some(url), _) => self.value(url, |url| url::parse(url))?,
            (None, Backend::TorVm) => {
                url::UpstreamUrl { scheme: Scheme::Direct, host: String::new(), port: 0, username: None }
            }
            (None, Backend::Proxy) => {
                return Err(self.0.error(
                    section,
                    Rejected::new("[upstream] has no url; add url = \"http://host:port\" with your proxy"),
                ));
            }
        };
        let addresses =
            self.list(&raw.addresses, "addresses", check::MAX_ADDRESSES, |text| check::proxy_address(address(text)?))?;
        // The documented default is an empty string, so that a template can be filled in.
        let named = raw.username.as_ref().filter(|name| !name.get_ref().is_empty());
        let username = named.map(|name| self.value(name, |name| check::username(name))).transpose()?;
        if let (Some(named), Some(_)) = (named, &url.username) {
            return Err(self.fault(named.span(), "the user name stands in the URL as well; keep one of them"));
        }
        let username = username.or(url.username);
        let password = self.password(raw.password_file.as_ref(), raw.password_credential.as_ref(), "")?;
        let place = raw.password_file.as_ref().or(raw.password_credential.as_ref()).map(Spanned::span);
        if url.scheme == Scheme::Direct {
            let useless = place.clone().or(named.map(Spanned::span)).or(raw.addresses.first().map(Spanned::span));
            if let Some(span) = useless {
                return Err(self.fault(span, "direct:// has no proxy to which this could belong; remove it"));
            }
        }
        if let (Some(span), None) = (place, &username) {
            return Err(self.fault(span, "a password needs a user name; add username = \"name\""));
        }
        Ok(UpstreamSpec { scheme: url.scheme, host: url.host, port: url.port, addresses, username, password })
    }

    /// `prefix`: of the two keys.
    pub(super) fn password(
        &self,
        file: Option<&Text>,
        credential: Option<&Text>,
        prefix: &str,
    ) -> Result<Option<PasswordSource>, ConfigError> {
        match (file, credential) {
            (Some(file), Some(credential)) => {
                let later = if file.span().start > credential.span().start { file } else { credential };
                let text =
                    format!("{prefix}password-file and {prefix}password-credential exclude each other; keep one");
                Err(self.fault(later.span(), text))
            }
            (Some(file), None) => self.value(file, |path| {
                let path = PathBuf::from(path);
                // The daemon's working directory means nothing to whoever wrote this.
                if path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0) {
                    Ok(Some(PasswordSource::File(path)))
                } else {
                    Err(Rejected::new(format!("{prefix}password-file needs the whole path, starting with /")))
                }
            }),
            (None, Some(credential)) => self.value(credential, |name| {
                secret::credential_name(name)?;
                Ok(Some(PasswordSource::Credential(name.clone())))
            }),
            (None, None) => Ok(None),
        }
    }

    fn tun(&self, raw: &raw::Tun) -> Result<TunSpec, ConfigError> {
        let mut tun = TunSpec::default();
        if let Some(name) = &raw.name {
            tun.name = self.value(name, |name| check::device_name(name))?;
        }
        if let Some(cidr) = &raw.cidr {
            tun.cidr = self.value(cidr, |cidr| check::cidr(cidr))?;
        }
        if let Some(cidr6) = &raw.cidr6 {
            tun.cidr6 = self.value(cidr6, |cidr6| check::cidr6(cidr6))?;
        }
        if let Some(mtu) = &raw.mtu {
            tun.mtu = self.value(mtu, |&mtu| check::mtu(mtu))?;
        }
        Ok(tun)
    }

    fn dns(&self, raw: &raw::Dns) -> Result<DnsSpec, ConfigError> {
        let modes = [("bypass", Some(())), ("virtual", None), ("tcp", None), ("relay", None)];
        self.one_of(raw.mode.as_ref(), "mode", &modes, ())?;
        let servers =
            self.list(&raw.servers, "servers", check::MAX_RESOLVERS, |text| check::resolver(address(text)?))?;
        Ok(DnsSpec { servers })
    }

    fn protect(&self, raw: &raw::Protect) -> Result<ProtectSpec, ConfigError> {
        let default = ProtectSpec::default();
        let forward = [("block", Some(ForwardSpec::Block)), ("tunnel", Some(ForwardSpec::Tunnel))];
        Ok(ProtectSpec {
            killswitch: raw.killswitch.unwrap_or(default.killswitch),
            inbound_replies: raw.inbound_replies.unwrap_or(default.inbound_replies),
            lan: self.list(&raw.lan, "lan", check::MAX_LAN, |text| check::lan(text))?,
            forward: self.one_of(raw.forward.as_ref(), "forward", &forward, default.forward)?,
            iptables_fallback: raw.iptables_fallback.unwrap_or(default.iptables_fallback),
        })
    }
}

fn address(text: &str) -> Result<std::net::IpAddr, Rejected> {
    text.parse().map_err(|_| Rejected::new(format!("\"{text}\" is not an IP address")))
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
