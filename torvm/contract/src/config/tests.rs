#![allow(clippy::unwrap_used, reason = "tests")]

use std::fmt::Debug;
use std::str::FromStr;

use super::*;

const FP: &str = "0123456789ABCDEF0123456789ABCDEF01234567";

/// Each text with `None` when it is accepted, or a part of what the user reads.
fn table<T: FromStr<Err = Rejected> + Debug>(rows: &[(&str, Option<&str>)]) {
    for (text, says) in rows {
        match (text.parse::<T>(), says) {
            (Ok(_), None) => {}
            (Err(error), Some(says)) => assert!(error.to_string().contains(says), "{text:?}: {error}"),
            (got, want) => assert_eq!(format!("{got:?}"), format!("{want:?}"), "{text:?}"),
        }
    }
}

#[test]
fn bridges() {
    let word = Some("neither an address, obfs4 nor meek_lite");
    let address = Some("needs the bridge's address");
    table::<Bridge>(&[
        ("192.0.2.1:443", None),
        ("  192.0.2.1:443  ", None),
        ("192.0.2.1:443 0123456789abcdef0123456789abcdef01234567", None),
        ("192.0.2.1:443 $0123456789abcdef0123456789abcdef01234567", None),
        ("[2001:db8::1]:443", None),
        ("obfs4 192.0.2.1:443 cert=abc iat-mode=2", None),
        ("meek_lite 192.0.2.1:80 url=https://a.example/", None),
        ("Bridge 192.0.2.1:443", word),
        ("bridge.example:443", word),
        ("webtunnel 192.0.2.1:443 url=https://x/y", word),
        ("none 192.0.2.1:443", word),
        ("snowflake 192.0.2.3:80 fingerprint=2B280B23E1107BB62ABFC40DDCC8824814F80A72", Some("needs UDP")),
        ("", address),
        ("192.0.2.1", address),
        ("192.0.2.1:0", address),
        ("192.0.2.1:65536", address),
        ("127.0.0.1:443", address),
        ("[::1]:443", address),
        ("[::ffff:127.0.0.1]:443", address),
        ("0.0.0.0:443", address),
        ("255.255.255.255:443", address),
        ("224.0.0.1:443", address),
        ("[fe80::1%1]:443", address),
        ("192.0.2.1:443 0123", Some("fingerprint")),
        ("192.0.2.1:443 cert=abc", Some("cert= is not known for transport none")),
        ("obfs4 192.0.2.1:443", Some("cert= is missing")),
        ("obfs4 192.0.2.1:443 cert=", Some("value of cert=")),
        ("obfs4 192.0.2.1:443 cert=a cert=b", Some("twice")),
        ("obfs4 192.0.2.1:443 cert=a iat-mode=3", Some("value of iat-mode=")),
        ("obfs4 192.0.2.1:443 cert=a exec=/bin/sh", Some("exec= is not known")),
        ("obfs4 192.0.2.1:443 cert=a\nLog debug file /x", Some("not of plain words")),
        ("obfs4 192.0.2.1:443 cert=\"a\"", Some("value of cert=")),
        ("obfs4 192.0.2.1:443 cert=a # comment", Some("not key=value")),
        ("meek_lite 192.0.2.1:80", Some("url= is missing")),
        ("meek_lite 192.0.2.1:80 url=http://a.example/", Some("value of url=")),
        ("meek_lite 192.0.2.1:80 url=https://192.0.2.7/", Some("value of url=")),
        ("meek_lite 192.0.2.1:80 url=https://a.example:8443/", Some("value of url=")),
        ("meek_lite 192.0.2.1:80 url=https://a.example/ front=10.0.0.1", Some("value of front=")),
    ]);
    let long = format!("obfs4 192.0.2.1:443 cert={}", "a".repeat(129));
    table::<Bridge>(&[(&long, Some("value of cert=")), (&"x ".repeat(600), Some("too long"))]);
}

#[test]
fn nodes_and_names() {
    let node = Some("neither a country");
    table::<Node>(&[
        ("{de}", None),
        ("{DE}", None),
        (FP, None),
        ("{d}", Some("two letters")),
        ("{deu}", Some("two letters")),
    ]);
    table::<Node>(&[
        ("de", node),
        ("", node),
        ("{de},{us}", Some("two letters")),
        ("{d\n", node),
        ("1.2.3.0/24", node),
        ("nick", node),
    ]);
    table::<HostName>(&[("a", None), ("a_b.example", None), ("1a.example", None)]);
    let name = Some("is not a host name");
    table::<HostName>(&[
        ("", name),
        ("a..b", name),
        ("-a", name),
        ("a b", name),
        ("192.0.2.1", name),
        ("a.0x7f", name),
        ("ä", name),
    ]);
    assert_eq!("{DE}".parse::<Node>().unwrap().to_string(), "{de}");
}

#[test]
fn authorities() {
    let good = format!("orport=9001 v3ident={FP} 11.0.0.1:9030 {FP}");
    let named = format!("auth1 {good}");
    table::<DirAuthority>(&[(&good, None), (&named, None)]);
    let is = |text: String, says| table::<DirAuthority>(&[(&text, Some(says))]);
    is(String::new(), "fingerprint");
    is(format!("a-b {good}"), "nickname");
    is(format!("{} {good}", "a".repeat(20)), "nickname");
    is(good.replace("9001", "0"), "orport is no port");
    is(good.replace("orport=9001 ", ""), "orport= is missing");
    is(good.replace("v3ident", "ident"), "use orport=");
    is(format!("bridge {good} {FP}"), "fingerprint");
    is(good.replace("11.0.0.1", "auth.example"), "use orport=");
    is(format!("weight=3 {good}"), "use orport=");
    is(format!("{good}\nLog debug file /x"), "not of plain words");
}

#[test]
fn transports_and_their_explanations() {
    for (word, is) in [
        ("none", Transport::None),
        ("obfs4", Transport::Obfs4),
        ("meek", Transport::Meek),
        ("meek-azure", Transport::Meek),
    ] {
        assert_eq!(word.parse(), Ok(is));
    }
    table::<Transport>(&[("snowflake", Some("UDP")), ("tor", Some("use none, obfs4 or meek"))]);
    let azure = "meek_lite 0.0.2.0:2 url=https://meek.azureedge.net/ front=ajax.aspnetcdn.com";
    let note = azure.parse::<Bridge>().unwrap().note().unwrap();
    assert!(note.contains("ajax.aspnetcdn.com is gone"), "{note}");
    let other = azure.replace("ajax.aspnetcdn.com", "www.example.org");
    assert_eq!(other.parse::<Bridge>().unwrap().note(), None);
}

#[test]
fn an_error_carries_no_escape_and_stays_short() {
    let error = format!("\x1b[31m{}", "x".repeat(10_000)).parse::<Node>().unwrap_err().to_string();
    assert!(error.starts_with("\"\\u{1b}[31mxx") && error.len() < 300, "{error}");
}

fn config(entry: Entry) -> GuestConfig {
    let tor = TorSettings { entry, ..TorSettings::default() };
    GuestConfig {
        control_password: format!("16:{}", "0".repeat(58)).try_into().unwrap(),
        tor,
        proxy: None,
        hosts: List::default(),
    }
}

fn bridges_of(lines: &[&str]) -> Entry {
    Entry::Bridges(lines.iter().map(|line| line.parse().unwrap()).collect::<Vec<_>>().try_into().unwrap())
}

#[test]
fn what_is_contacted_is_the_proxy_or_else_the_bridges() {
    assert_eq!(config(Entry::Any).contacts(), None);
    let meek = "meek_lite 192.0.2.20:80 url=https://a.example/ front=Front.example";
    let mut config = config(bridges_of(&["192.0.2.1:443", "obfs4 [2001:db8::1]:9001 cert=a", meek]));
    let names: Vec<_> = config.tor.names().map(ToString::to_string).collect();
    assert_eq!(names, ["front.example"]);
    let known = ["192.0.2.1:443".parse().unwrap(), "[2001:db8::1]:9001".parse().unwrap()];
    assert_eq!(config.contacts(), Some(known.to_vec()), "meek's address is a label");
    let host = |address: &str| Host { name: "front.example".parse().unwrap(), address: address.parse().unwrap() };
    config.hosts = vec![host("203.0.113.1"), host("203.0.113.2")].try_into().unwrap();
    let fronts = ["203.0.113.1:443".parse().unwrap(), "203.0.113.2:443".parse().unwrap()];
    assert_eq!(config.contacts(), Some([known, fronts].concat()));
    config.proxy =
        Some(Proxy { kind: proxy::Kind::Socks5, address: "198.51.100.1:1080".parse().unwrap(), login: None });
    assert_eq!(config.contacts(), Some(vec!["198.51.100.1:1080".parse().unwrap()]));
}

#[test]
fn the_guest_reads_what_the_host_wrote_and_nothing_else() {
    let mut config = config(bridges_of(&["obfs4 192.0.2.1:443 cert=a"]));
    let login = Login { user: "me".to_owned().try_into().unwrap(), password: "hunter2".to_owned().try_into().unwrap() };
    config.proxy =
        Some(Proxy { kind: proxy::Kind::Https, address: "192.0.2.9:1".parse().unwrap(), login: Some(login) });
    let bytes = config.to_bytes().unwrap();
    assert_eq!(GuestConfig::from_bytes(&bytes), Ok(config.clone()));
    assert!(!format!("{config:?}").contains("hunter2"), "the password can be printed");
    let text = String::from_utf8(bytes).unwrap();
    for (good, bad) in [
        ("\"tor\":", "\"more\":1,\"tor\":"),
        ("cert=a", "cert=a\\nLog debug file /x"),
        ("hunter2", "hunter2\\u0000"),
        ("hunter2", "hunter2\\n"),
        ("\"me\"", "\"me:x\""),
        ("\"me\"", "\"\""),
        ("16:0", "16:x"),
        ("192.0.2.9:1", "proxy.example:1"),
        ("obfs4 192", "obfs4 exec 192"),
    ] {
        let changed = text.replacen(good, bad, 1);
        assert_ne!(changed, text);
        assert!(GuestConfig::from_bytes(changed.as_bytes()).is_err(), "{bad}");
    }
    assert!(GuestConfig::from_bytes(&vec![b' '; MAX_CONFIG + 1]).is_err());
}

#[test]
fn lists_have_a_bound_and_all_of_them_together_fit() {
    let bridge = format!("obfs4 192.0.2.1:443 {FP} cert={}", "a".repeat(128));
    let many: Vec<Bridge> = vec![bridge.parse().unwrap(); MAX_BRIDGES];
    assert!(List::<Bridge, MAX_BRIDGES>::try_from([many.clone(), many.clone()].concat()).is_err());
    let nodes: List<Node, MAX_NODES> = vec![FP.parse().unwrap(); MAX_NODES].try_into().unwrap();
    let authority: DirAuthority =
        format!("{} orport=65535 v3ident={FP} 111.111.111.111:65535 {FP}", "a".repeat(19)).parse().unwrap();
    let host = Host { name: vec!["a".repeat(62); 4].join(".").parse().unwrap(), address: [111; 4].into() };
    let line = "\u{10ffff}".repeat(63);
    let login = Login { user: line.clone().try_into().unwrap(), password: line.try_into().unwrap() };
    let mut config = config(Entry::Bridges(many.try_into().unwrap()));
    config.tor.exit_nodes = nodes.clone();
    config.tor.exclude_nodes = nodes.clone();
    config.tor.exclude_exit_nodes = nodes;
    let authorities = vec![authority; network::MAX_AUTHORITIES].try_into().unwrap();
    config.tor.network = Some(Network { authorities, testing: true });
    config.proxy =
        Some(Proxy { kind: proxy::Kind::Https, address: "111.111.111.111:65535".parse().unwrap(), login: Some(login) });
    config.hosts = vec![host; MAX_HOSTS].try_into().unwrap();
    assert!(config.to_bytes().unwrap().len() < MAX_CONFIG);
}
