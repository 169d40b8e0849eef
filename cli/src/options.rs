//! From settings on the command line to the `a{sv}` of the bus.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use proxyvpn_dbus::options::connect as key;
use zbus::{Fd, Variant};

use crate::args::{Cidr, Settings};
use crate::bus::Bus;
use crate::exit::{Exit, Failure};
use crate::secret::Secret;
use crate::text;

/// Options of a call.
pub(crate) type Options = HashMap<&'static str, Variant<'static>>;

/// Advice for whoever puts a password where others can read it.
const SAFE_PASSWORD: &str = "Use --password-file FILE, or --password - to be asked for it.";

/// Whether the call needs the password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Password {
    /// Read it.
    Read,
    /// The call changes nothing and asks nobody, so it stays where it is.
    Leave,
}

impl Settings {
    /// The proxy as a URL, when one is given.
    ///
    /// # Errors
    /// A password in it, or a host that is none.
    pub(crate) fn url(&self) -> Result<Option<String>, Failure> {
        if let Some(url) = &self.proxy_url {
            if url_has_password(url) {
                // The URL itself is not repeated: it holds the password.
                return Err(Failure::new(
                    Exit::Usage,
                    "a password in --proxy-url is visible to all users of this machine",
                )
                .advise(format!("{SAFE_PASSWORD} The user name may stay in the URL.")));
            }
            return Ok(Some(url.clone()));
        }
        let (Some(host), Some(port)) = (&self.proxy_host, self.proxy_port) else { return Ok(None) };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if bare.parse::<Ipv6Addr>().is_ok() {
            return Ok(Some(format!("http://[{bare}]:{port}")));
        }
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control() || "/@:?#[]".contains(c)) {
            return Err(Failure::new(
                Exit::Usage,
                "--proxy-host is a host name or an address, without scheme and port",
            ));
        }
        Ok(Some(format!("http://{host}:{port}")))
    }

    /// Whether a setting other than `--verbose` is given.
    fn any(&self) -> bool {
        self.proxy_url.is_some()
            || self.proxy_host.is_some()
            || self.username.is_some()
            || self.password.is_some()
            || self.password_file.is_some()
            || !self.proxy_ip.is_empty()
            || self.tun_name.is_some()
            || !self.tun_cidr.is_empty()
            || self.mtu.is_some()
            || !self.dns.is_empty()
            || self.no_killswitch
            || !self.lan.is_empty()
            || !self.bypass_user.is_empty()
    }

    /// Refuses what can be refused without asking anybody.
    pub(crate) fn check(&self, profile: Option<&str>) -> Result<(), Failure> {
        if profile == Some("") {
            return Err(Failure::new(Exit::Usage, "the name of the profile is empty"));
        }
        let url = self.url()?;
        if self.username.as_ref().is_some_and(|name| name.contains(':')) {
            return Err(Failure::new(Exit::Usage, "a user name for a proxy cannot contain ':' (RFC 7617)")
                .advise(format!("If a password follows it: {SAFE_PASSWORD}")));
        }
        if self.tun_cidr.iter().filter(|cidr| matches!(cidr, Cidr::V4(_))).count() > 1
            || self.tun_cidr.iter().filter(|cidr| matches!(cidr, Cidr::V6(_))).count() > 1
        {
            return Err(Failure::new(Exit::Usage, "--tun-cidr takes one IPv4 and one IPv6 prefix"));
        }
        if profile.is_none() && url.is_none() && self.any() {
            return Err(Failure::new(Exit::Usage, "these settings need a PROFILE to override, or a --proxy-url"));
        }
        Ok(())
    }

    /// The name for the call: the given one; empty with a proxy of its own; else the only profile there is.
    pub(crate) async fn profile(&self, given: Option<&str>, bus: &Bus) -> Result<String, Failure> {
        if let Some(name) = given {
            return Ok(name.to_owned());
        }
        if self.any() {
            return Ok(String::new());
        }
        let mut names: Vec<String> = bus.profiles().await?.into_iter().map(|(name, _)| name).collect();
        match (names.pop(), names.is_empty()) {
            (None, _) => Err(Failure::new(Exit::Usage, "there is no profile yet").advise(
                "Give a --proxy-url, or import a profile: proxyctl profile import FILE\n\
                          One that is there and not listed has an error: proxyctl doctor NAME tells it.",
            )),
            (Some(only), true) => Ok(only),
            (Some(last), false) => {
                names.push(last);
                Err(Failure::new(Exit::Usage, "there is more than one profile: which?").advise(names.join("\n")))
            }
        }
    }

    /// The options of the call.
    pub(crate) async fn options(&self, password: Password) -> Result<Options, Failure> {
        let mut options = Options::new();
        let mut text = |key, value: &Option<String>| {
            if let Some(value) = value {
                options.insert(key, Variant::from(value.clone()));
            }
        };
        text(key::PROXY_URL, &self.url()?);
        text(key::USERNAME, &self.username);
        text(key::TUN_NAME, &self.tun_name);
        for cidr in &self.tun_cidr {
            match cidr {
                Cidr::V4(cidr) => text(key::TUN_CIDR, &Some(cidr.clone())),
                Cidr::V6(cidr) => text(key::TUN_CIDR6, &Some(cidr.clone())),
            }
        }
        let mut list = |key, values: Vec<String>| {
            if !values.is_empty() {
                options.insert(key, Variant::from(values));
            }
        };
        let addresses = |values: &[IpAddr]| values.iter().map(ToString::to_string).collect();
        list(key::PROXY_IP, addresses(&self.proxy_ip));
        list(key::DNS, addresses(&self.dns));
        list(key::LAN, self.lan.clone());
        list(key::BYPASS_USERS, self.bypass_user.clone());
        if let Some(mtu) = self.mtu {
            options.insert(key::MTU, Variant::from(mtu));
        }
        if self.no_killswitch {
            options.insert(key::KILLSWITCH, Variant::from(false));
        }
        if self.verbose {
            options.insert(key::VERBOSE, Variant::from(true));
        }
        if password == Password::Read
            && let Some(secret) = self.secret().await?
        {
            options.insert(key::PASSWORD, Variant::Fd(Fd::from(secret.into_fd()?)));
        }
        Ok(options)
    }

    async fn secret(&self) -> Result<Option<Secret>, Failure> {
        if let Some(path) = &self.password_file {
            return Secret::from_file(path).map(Some);
        }
        match &self.password {
            None => Ok(None),
            Some(given) if given.is_dash() => Secret::from_stdin().await.map(Some),
            Some(given) => {
                text::note(&format!(
                    "proxyctl: warning: a password on the command line is visible to all users (ps). {SAFE_PASSWORD}"
                ));
                given.clone().checked().map(Some)
            }
        }
    }
}

/// Whether the authority of a URL holds a password (RFC 3986 3.2.1: after the first ':' of what precedes the last '@').
fn url_has_password(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    // A password may itself hold '/', '?' or '#' unescaped: whatever precedes an '@' is looked at too.
    let userinfo = authority.rsplit_once('@').or_else(|| rest.rsplit_once('@')).map(|(userinfo, _)| userinfo);
    userinfo.is_some_and(|userinfo| userinfo.contains(':'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_found() {
        for with in ["http://u:p@h:1", "u:p@h:1", "http://:p@h", "http://u:p/w@h:1", "http://u:p@w@h:1", "http://u:@h"]
        {
            assert!(url_has_password(with), "{with}");
        }
        for without in
            ["http://h:1", "http://u@h:1", "http://u%3Ax@h:1", "http://[::1]:80", "h:80", "http://u@[::1]:80/a:b"]
        {
            assert!(!url_has_password(without), "{without}");
        }
    }

    #[test]
    fn a_refused_url_is_not_repeated() {
        let settings = Settings { proxy_url: Some("http://u:hunter2@h:1".to_owned()), ..Settings::default() };
        let failure = settings.check(None).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(!failure.message().contains("hunter2") && failure.message().contains("--password-file"));
    }

    #[test]
    fn host_and_port_make_a_url() {
        let url = |host: &str| {
            Settings { proxy_host: Some(host.to_owned()), proxy_port: Some(3128), ..Settings::default() }.url()
        };
        assert_eq!(url("proxy.example").unwrap().unwrap(), "http://proxy.example:3128");
        assert_eq!(url("fd00::1").unwrap().unwrap(), "http://[fd00::1]:3128");
        assert_eq!(url("[fd00::1]").unwrap().unwrap(), "http://[fd00::1]:3128");
        for bad in ["", "http://h", "u:p@h", "a b", "[h]", "h\x1b"] {
            assert_eq!(url(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }

    #[test]
    fn settings_without_a_way_out_need_a_profile() {
        let settings = Settings { mtu: Some(1500), ..Settings::default() };
        assert_eq!(settings.check(None).unwrap_err().exit, Exit::Usage);
        assert!(settings.check(Some("office")).is_ok());
        assert_eq!(settings.check(Some("")).unwrap_err().exit, Exit::Usage);
        assert!(Settings { verbose: true, ..Settings::default() }.check(None).is_ok());
    }

    #[tokio::test]
    async fn every_setting_has_its_option() {
        let settings = Settings {
            proxy_url: Some("http://h:1".to_owned()),
            username: Some("u".to_owned()),
            password: Some("p".parse().unwrap()),
            proxy_ip: vec!["10.0.0.1".parse().unwrap()],
            tun_name: Some("t0".to_owned()),
            tun_cidr: vec![Cidr::V4("10.1.1.1/30".to_owned()), Cidr::V6("fd00::1/64".to_owned())],
            mtu: Some(1500),
            dns: vec!["::1".parse().unwrap()],
            no_killswitch: true,
            lan: vec!["10.0.0.0/8".to_owned()],
            bypass_user: vec!["squid".to_owned()],
            verbose: true,
            ..Settings::default()
        };
        let options = settings.options(Password::Read).await.unwrap();
        for (key, signature) in [
            (key::PROXY_URL, "s"),
            (key::USERNAME, "s"),
            (key::PASSWORD, "h"),
            (key::PROXY_IP, "as"),
            (key::TUN_NAME, "s"),
            (key::TUN_CIDR, "s"),
            (key::TUN_CIDR6, "s"),
            (key::MTU, "u"),
            (key::DNS, "as"),
            (key::KILLSWITCH, "b"),
            (key::LAN, "as"),
            (key::BYPASS_USERS, "as"),
            (key::VERBOSE, "b"),
        ] {
            assert_eq!(options[key].value_signature().to_string(), signature, "{key}");
        }
        assert_eq!(options.len(), 13);
        assert!(!settings.options(Password::Leave).await.unwrap().contains_key(key::PASSWORD));
    }
}
