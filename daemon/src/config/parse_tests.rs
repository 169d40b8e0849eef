#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;

use super::*;

const MINIMAL: &str = "[upstream]\nurl = \"http://proxy.example:8080\"\n";

fn read(text: &str) -> Result<Profile, ConfigError> {
    profile("work", "work.toml", text)
}

#[test]
fn a_minimal_profile_has_the_documented_defaults() {
    let full = r#"
backend = "proxy"
autoconnect = false
[upstream]
url = "http://proxy.example:8080"
addresses = []
username = ""
[tun]
name = "pvpn0"
cidr = "10.255.255.1/30"
cidr6 = "fd70:7670:6e::1/64"
mtu = 65535
[dns]
mode = "bypass"
servers = []
[protect]
killswitch = true
inbound-replies = true
lan = []
forward = "block"
iptables-fallback = false
[bypass]
users = []
"#;
    assert_eq!(read(MINIMAL).unwrap(), read(full).unwrap());
    assert!(read(MINIMAL).unwrap().protect.killswitch);
}

#[test]
fn every_key_arrives() {
    let profile = read(
        r#"
autoconnect = true
[upstream]
url = "http://[2001:db8::1]:3128"
addresses = ["192.0.2.1", "2001:db8::2", "192.0.2.1"]
username = "ann"
password-file = "/etc/proxyvpn/work.secret"
[tun]
name = "tun7"
cidr = "10.9.0.1/32"
cidr6 = "fd00::1/128"
mtu = 1500
[dns]
servers = ["192.0.2.53"]
[protect]
killswitch = false
inbound-replies = false
lan = ["192.168.0.0/16"]
forward = "tunnel"
iptables-fallback = true
[bypass]
users = ["daemon", 54321]
"#,
    )
    .unwrap();
    let upstream = &profile.upstream;
    assert_eq!((profile.autoconnect, upstream.host.as_str(), upstream.port), (true, "2001:db8::1", 3128));
    assert_eq!(upstream.addresses.len(), 2, "what stands there twice counts once");
    assert_eq!(upstream.username.as_deref(), Some("ann"));
    assert_eq!(upstream.password, Some(PasswordSource::File("/etc/proxyvpn/work.secret".into())));
    assert_eq!((profile.tun.name.as_str(), profile.tun.mtu), ("tun7", 1500));
    assert_eq!(
        (profile.tun.cidr.to_string(), profile.tun.cidr6.to_string()),
        ("10.9.0.1/32".into(), "fd00::1/128".into())
    );
    assert_eq!(profile.dns.servers.len(), 1);
    assert_eq!((profile.protect.killswitch, profile.protect.inbound_replies), (false, false));
    assert_eq!(profile.protect.lan.len(), 1);
    assert_eq!((profile.protect.forward, profile.protect.iptables_fallback), (ForwardSpec::Tunnel, true));
    assert_eq!((profile.bypass_users.len(), profile.bypass_users[1]), (2, 54321));
}

#[test]
fn the_other_backend_needs_no_url() {
    let profile = read("backend = \"torvm\"\n").unwrap();
    assert_eq!((profile.backend, profile.upstream.scheme), (Backend::TorVm, Scheme::Direct));
}

#[test]
fn an_error_names_file_line_and_column_and_what_to_do() {
    let rows: &[(&str, &str, &str)] = &[
        ("", "1:1", "add url ="),
        ("autoconnect = true\n[upstream]\n", "2:1", "add url ="),
        ("autoconect = true\n", "1:1", "unknown key `autoconect`, expected one of"),
        ("autoconnect = true\nautoconnect = true\n", "2:1", "duplicate key"),
        ("autoconnect = 1\n", "1:15", "expected a boolean"),
        ("autoconnect = \n", "1:15", ""),
        ("backend = \"vpn\"\n", "1:11", "use \"proxy\" or \"torvm\""),
        ("[upstream]\nurl = \"https://p:1\"\n", "2:7", "not in this version"),
        ("[upstream]\nurl = \"http://p\"\n", "2:7", "port is missing"),
        ("[upstream]\nurl = 7\n", "2:7", "expected a string"),
        ("[upstream]\nurl = \"http://p:1\"\npassword = \"x\"\n", "3:1", "password-file"),
        ("[upstream]\nurl = \"http://a@p:1\"\nusername = \"b\"\n", "3:12", "keep one of them"),
        ("[upstream]\nurl = \"http://p:1\"\nusername = \"a:b\"\n", "3:12", "colon"),
        (
            "[upstream]\nurl = \"http://p:1\"\naddresses = [\"192.0.2.1\", \"p\"]\n",
            "3:27",
            "\"p\" is not an IP address",
        ),
        ("[upstream]\nurl = \"http://p:1\"\naddresses = [\"0.0.0.0\"]\n", "3:14", "cannot be a proxy's address"),
        ("[upstream]\nurl = \"http://p:1\"\npassword-file = \"/x\"\n", "3:17", "needs a user name"),
        ("[upstream]\nurl = \"http://a@p:1\"\npassword-file = \"x\"\n", "3:17", "whole path"),
        ("[upstream]\nurl = \"http://a@p:1\"\npassword-credential = \"a/b\"\n", "3:23", "systemd credential"),
        (
            "[upstream]\nurl = \"http://a@p:1\"\npassword-credential = \"a\"\npassword-file = \"/x\"\n",
            "4:17",
            "exclude each other",
        ),
        ("[upstream]\nurl = \"direct://\"\nusername = \"a\"\n", "3:12", "direct:// has no proxy"),
        ("[upstream]\nurl = \"direct://\"\naddresses = [\"192.0.2.1\"]\n", "3:14", "direct:// has no proxy"),
        ("[upstream]\nurl = \"http://p:1\"\n[tun]\nname = \"a/b\"\n", "4:8", "device's name"),
        ("[upstream]\nurl = \"http://p:1\"\n[tun]\nmtu = 1000\n", "4:7", "1280 to 65535"),
        ("[upstream]\nurl = \"http://p:1\"\n[tun]\nmtu = \"big\"\n", "4:7", "expected a whole number"),
        ("[upstream]\nurl = \"http://p:1\"\n[protect]\nlan = \"10.0.0.0/8\"\n", "4:7", "expected a list"),
        ("[upstream]\nurl = \"http://p:1\"\n[tun]\ncidr = \"10.0.0.0/8\"\n", "4:8", "use one between them"),
        ("[upstream]\nurl = \"http://p:1\"\n[tun]\ncidr6 = \"x\"\n", "4:9", "IPv6 address with its prefix"),
        ("[upstream]\nurl = \"http://p:1\"\n[dns]\nmode = \"tcp\"\n", "4:8", "not in this version; use \"bypass\""),
        ("[upstream]\nurl = \"http://p:1\"\n[dns]\nmode = \"x\"\n", "4:8", "is no mode"),
        ("[upstream]\nurl = \"http://p:1\"\n[dns]\nservers = [\"dns\"]\n", "4:12", "not an IP address"),
        ("[upstream]\nurl = \"http://p:1\"\n[protect]\nkillswich = true\n", "4:1", "unknown key `killswich`"),
        ("[upstream]\nurl = \"http://p:1\"\n[protect]\nforward = \"all\"\n", "4:11", "use \"block\" or \"tunnel\""),
        ("[upstream]\nurl = \"http://p:1\"\n[protect]\nlan = [\"0.0.0.0/0\"]\n", "4:8", "not a local network"),
        ("[upstream]\nurl = \"http://p:1\"\n[bypass]\nusers = [\"root\"]\n", "4:10", "root cannot"),
        ("[upstream]\nurl = \"http://p:1\"\n[bypass]\nusers = [0]\n", "4:10", "root cannot"),
        ("[upstream]\nurl = \"http://p:1\"\n[bypass]\nusers = [-1]\n", "4:10", "there is no user \"-1\""),
        ("[upstream]\nurl = \"http://p:1\"\n[bypass]\nusers = [true]\n", "4:10", "a name or a number"),
        ("[upstream]\nurl = \"http://p:1\"\n[bypass]\nusers = [\"no-such-user-here\"]\n", "4:10", "there is no user"),
        ("[upstream]\nurl = \"http://p:1\"\n[torvm]\nmemory-mib = 1\n", "3:1", "backend = \"torvm\""),
        ("backend = \"torvm\"\n[torvm]\nmemory = 1\n", "3:1", "unknown key `memory`"),
    ];
    for (text, place, says) in rows {
        let error = match read(text) {
            Err(error) => error.to_string(),
            Ok(profile) => panic!("{text:?} was accepted: {profile:?}"),
        };
        assert!(error.starts_with(&format!("work.toml:{place}: ")), "{text:?}: {error}");
        assert!(error.contains(says), "{text:?}: {error}");
    }
}

#[test]
fn lists_are_bounded() {
    let many = ["\"192.0.2.1\""; check::MAX_RESOLVERS + 1].join(", ");
    let error = read(&format!("{MINIMAL}[dns]\nservers = [{many}]\n")).unwrap_err().to_string();
    assert!(error.contains("servers has more than 8 entries"), "{error}");
}

#[test]
fn no_error_repeats_a_password() {
    for text in [
        "[upstream]\nurl = \"http://ann:hunter2@p:1\"\n",
        "[upstream]\nurl = \"http://p:1\"\npassword = \"hunter2\"\n",
        "[upstream]\nurl = \"http://p:1\"\npassword = \"hunter2\n",
        "[upstream]\nurl = http://ann:hunter2@p:1\n",
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn a_bad_name_is_an_error() {
    assert!(profile("a/b", "f", MINIMAL).unwrap_err().to_string().contains("cannot be a profile's name"));
}

/// Texts that come close to a profile.
fn near() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("[upstream]\n".to_owned()),
        Just("[protect]\n".to_owned()),
        Just("[[bypass]]\n".to_owned()),
        "(url|addresses|username|mtu|cidr|lan|users|name) = (\"\\PC{0,20}\"|\\[\"\\PC{0,9}\"\\]|-?[0-9]{1,25})\n",
        "url = \"http://[a-z:@/%\\[\\]0-9.]{0,30}\"\n",
        "\\PC{0,30}",
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        let _ = read(&text);
        let _ = crate::config::daemon::parse("f", &text);
    }

    #[test]
    fn text_that_is_nearly_a_profile_never_panics(text in near()) {
        if let Err(error) = read(&text) {
            prop_assert!(error.to_string().starts_with("work.toml:"));
        }
    }
}
