#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::path::PathBuf;

use zbus::DBusError as _;

use super::*;
use crate::config::profile::PasswordSource;

fn pipe() -> Variant<'static> {
    Variant::from(zbus::Fd::from(OwnedFd::from(std::io::pipe().unwrap().0)))
}

fn map(options: Vec<(&str, Variant<'static>)>) -> HashMap<String, OwnedVariant> {
    options.into_iter().map(|(key, value)| (key.to_owned(), OwnedVariant::try_from(value).unwrap())).collect()
}

/// The profile, or the error's text.
fn applied(base: Option<Profile>, options: Vec<(&str, Variant<'static>)>) -> Result<Profile, String> {
    let text = |error: Error| match error {
        Error::InvalidOption(text) => text,
        other => panic!("{other:?}"),
    };
    let mut options = ConnectOptions::parse(map(options)).map_err(text)?;
    let password = options.take_password().is_some();
    options.apply(base, password).map_err(text)
}

const URL: (&str, &str) = ("proxy-url", "http://proxy.example:8080");

fn url() -> (&'static str, Variant<'static>) {
    (URL.0, URL.1.into())
}

/// A stored profile with a password.
fn stored(host: &str) -> Profile {
    let mut profile = applied(None, vec![url(), ("username", "u".into())]).unwrap();
    "work".clone_into(&mut profile.name);
    host.clone_into(&mut profile.upstream.host);
    profile.upstream.password = Some(PasswordSource::File(PathBuf::from("/etc/proxyvpn/work.password")));
    profile
}

#[test]
fn the_device_and_the_password_of_a_torvm_stay_what_they_are() {
    let tor = |more: &str| {
        let text = format!("backend = \"torvm\"\n[torvm]\n{more}");
        Some(crate::config::parse::profile("tor", "tor.toml", &text).unwrap())
    };
    assert!(applied(tor(""), vec![url(), ("tun-name", "tap9".into()), ("dns", vec!["192.0.2.53"].into())]).is_ok());
    let device: [(&str, Variant<'static>); 3] =
        [("tun-cidr", "10.9.0.1/30".into()), ("tun-cidr6", "fd00::1/64".into()), ("mtu", 1400_u32.into())];
    for option in device {
        assert!(applied(tor(""), vec![option]).unwrap_err().contains("fixed address"));
    }
    let login = "proxy-username = \"u\"\nproxy-password-file = \"/etc/proxyvpn/p\"\n";
    let redirects = || -> [Vec<(&'static str, Variant<'static>)>; 3] {
        let user = || ("username", Variant::from("u"));
        [vec![url()], vec![url(), user(), ("password", pipe())], vec![("dns", vec!["192.0.2.53"].into())]]
    };
    for options in redirects() {
        let error = applied(tor(&format!("https-proxy = \"proxy.example:3128\"\n{login}")), options).unwrap_err();
        assert!(error.contains("could go to somebody else"), "{error}");
    }
    for options in redirects() {
        assert!(applied(tor("https-proxy = \"proxy.example:3128\"\n"), options).is_ok(), "there is no password");
    }
    let snowflake = || tor("bridges = [\"snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b\"]\n");
    assert!(applied(snowflake(), vec![url()]).unwrap_err().contains("option proxy-url: snowflake needs UDP"));
    assert!(applied(snowflake(), vec![("proxy-url", "direct://".into())]).is_ok());
    let by_address = tor(&format!("https-proxy = \"192.0.2.9:3128\"\n{login}"));
    assert!(applied(by_address, vec![("dns", vec!["192.0.2.53"].into())]).is_ok(), "nothing is looked up");
}

#[test]
fn every_option_lands_in_the_profile() {
    let profile = applied(
        None,
        vec![
            url(),
            ("username", "u".into()),
            ("password", pipe()),
            ("proxy-ip", vec!["192.0.2.1", "192.0.2.1", "2001:db8::1"].into()),
            ("tun-name", "tun9".into()),
            ("tun-cidr", "10.9.0.1/30".into()),
            ("tun-cidr6", "fd00::1/64".into()),
            ("mtu", 1500_u32.into()),
            ("dns", vec!["192.0.2.53"].into()),
            ("killswitch", false.into()),
            ("lan", vec!["192.168.0.0/16"].into()),
            ("bypass-users", vec!["4242"].into()),
            ("verbose", true.into()),
        ],
    )
    .unwrap();
    assert_eq!(profile.name, "adhoc");
    assert_eq!(profile.upstream.to_string(), URL.1);
    assert_eq!(profile.upstream.username.as_deref(), Some("u"));
    assert_eq!(profile.upstream.addresses.len(), 2, "what stands in a list twice counts once");
    assert_eq!(profile.tun.name, "tun9");
    assert_eq!(profile.tun.cidr.to_string(), "10.9.0.1/30");
    assert_eq!(profile.tun.cidr6.to_string(), "fd00::1/64");
    assert_eq!(profile.tun.mtu, 1500);
    assert_eq!(profile.dns.servers.len(), 1);
    assert!(!profile.protect.killswitch);
    assert_eq!(profile.protect.lan.len(), 1);
    assert_eq!(profile.bypass_users, [4242]);
}

#[test]
fn without_options_the_defaults_are_those_of_a_file() {
    let from_file = crate::config::parse::profile("work", "f", &format!("[upstream]\nurl = \"{}\"\n", URL.1)).unwrap();
    let mut adhoc = applied(None, vec![url()]).unwrap();
    from_file.name.clone_into(&mut adhoc.name);
    assert_eq!(adhoc, from_file);
}

#[test]
fn a_bad_option_is_named() {
    let long: Vec<String> = (0..65).map(|n| format!("192.168.{n}.0/24")).collect();
    let cases: Vec<(&str, Variant<'static>, &str)> = vec![
        ("proxy-url", 5_u32.into(), "it has the type u, not s"),
        ("proxy-url", "ftp://x".into(), "the scheme is not known"),
        ("proxy-url", "http://u:p@x:1".into(), "password"),
        ("username", "a:b".into(), "colon"),
        ("password", "hunter2".into(), "it has the type s, not h"),
        ("proxy-ip", "192.0.2.1".into(), "it has the type s, not as"),
        ("proxy-ip", vec!["0.0.0.0"].into(), "0.0.0.0"),
        ("tun-name", "a/b".into(), "a/b"),
        ("tun-cidr", "10.0.0.0/30".into(), "10.0.0.0"),
        ("tun-cidr6", "x".into(), "x"),
        ("mtu", 1279_u32.into(), "1280"),
        ("mtu", 1500_i32.into(), "it has the type i, not u"),
        ("dns", vec!["localhost"].into(), "not an IP address"),
        ("killswitch", "false".into(), "it has the type s, not b"),
        ("lan", vec!["8.8.8.0/24"].into(), "8.8.8.0/24"),
        ("lan", long.into(), "more than 64 entries"),
        ("bypass-users", vec!["root"].into(), "root"),
        ("verbose", 1_u32.into(), "it has the type u, not b"),
    ];
    for (key, value, part) in cases {
        let options = if key == "proxy-url" { vec![(key, value)] } else { vec![url(), (key, value)] };
        let text = applied(None, options).unwrap_err();
        assert!(text.starts_with(&format!("option {key}: ")) && text.contains(part), "{key}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn an_unknown_option_is_refused_and_shown_harmless() {
    for (key, shown) in [("kill-switch", "\"kill-switch\""), ("a\x1b[31m", "\"a\\u{1b}[31m\"")] {
        let text = applied(None, vec![url(), (key, false.into())]).unwrap_err();
        assert!(text.contains(shown), "{text}");
    }
    assert!(applied(None, vec![url(), (&"x".repeat(100_000), false.into())]).unwrap_err().len() < 200);
    assert!(matches!(none(&map(vec![("force", true.into())])), Err(Error::InvalidOption(_))));
    assert!(none(&HashMap::new()).is_ok());
}

#[test]
fn values_that_exclude_each_other() {
    for (options, part) in [
        (vec![("killswitch", true.into())], "proxy-url"),
        (vec![("proxy-url", "http://u@x:1".into()), ("username", "v".into())], "option username"),
        (vec![url(), ("password", pipe())], "option password: a password needs a user name"),
        (vec![("proxy-url", "direct://".into()), ("proxy-ip", vec!["192.0.2.1"].into())], "option proxy-ip"),
        (vec![("proxy-url", "direct://".into()), ("username", "u".into())], "option username"),
    ] {
        let text = applied(None, options).unwrap_err();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_stored_password_goes_nowhere_else() {
    let elsewhere: Vec<(&str, Variant<'static>)> = vec![
        ("proxy-url", "http://evil.example:1".into()),
        ("username", "v".into()),
        ("proxy-ip", vec!["192.0.2.66"].into()),
        ("dns", vec!["192.0.2.53"].into()),
    ];
    for (key, value) in elsewhere {
        let again = value.try_clone().unwrap();
        let text = applied(Some(stored("proxy.example")), vec![(key, value)]).unwrap_err();
        assert!(text.contains(&format!("option {key}")) && text.contains("password"), "{text}");
        // With a password of the caller's own it is the caller's affair.
        let mut options = vec![(key, again), ("password", pipe())];
        if key == "proxy-url" {
            options.push(("username", "v".into()));
        }
        let profile = applied(Some(stored("proxy.example")), options).unwrap();
        assert_eq!(profile.upstream.password, Some(PasswordSource::Caller), "the stored one is out of it for good");
    }
    let kept = applied(Some(stored("192.0.2.1")), vec![("dns", vec!["192.0.2.53"].into())]).unwrap();
    assert!(kept.upstream.password.is_some(), "an address is not looked up");
    let kept = applied(Some(stored("proxy.example")), vec![("killswitch", false.into())]).unwrap();
    assert!(kept.upstream.password.is_some() && !kept.protect.killswitch && kept.name == "work");
}

#[test]
fn the_lan_is_opened_only_by_a_prefix() {
    let opens = |options| ConnectOptions::parse(map(options)).unwrap().opens_lan();
    assert!(opens(vec![("lan", vec!["10.0.0.0/8"].into())]));
    assert!(!opens(vec![("lan", Vec::<&str>::new().into())]));
    assert!(!opens(vec![url()]));
}

#[test]
fn options_of_an_import() {
    let parsed = import(map(vec![("name", "work".into()), ("replace", true.into())])).unwrap();
    assert_eq!(parsed, ("work".to_owned(), true));
    for (options, part) in [
        (vec![], "option name: it is missing"),
        (vec![("name", "../x".into())], "option name"),
        (vec![("name", "adhoc".into())], "option name"),
        (vec![("name", "work".into()), ("path", "/etc".into())], "\"path\""),
    ] {
        let error = import(map(options)).unwrap_err();
        assert!(error.description().unwrap().contains(part), "{error:?}");
    }
}
