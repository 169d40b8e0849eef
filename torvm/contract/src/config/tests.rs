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
    let word = Some("neither an address, obfs4, meek_lite nor snowflake");
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

/// As Tor Browser has them.
const SNOWFLAKE: &str = "snowflake 192.0.2.3:80 2B280B23E1107BB62ABFC40DDCC8824814F80A72 \
    fingerprint=2B280B23E1107BB62ABFC40DDCC8824814F80A72 url=https://1098762253.rsc.cdn77.org/ \
    fronts=app.datapacket.com,www.datapacket.com \
    ice=stun:stun.antisip.com:3478,stun:stun.epygi.com:3478,stun:stun.nextcloud.com:443,stun:192.0.2.9:3478,stun:stun.uls.co.za \
    utls-imitate=hellorandomizedalpn";

#[test]
fn snowflake() {
    let bridge: Bridge = SNOWFLAKE.parse().unwrap();
    assert_eq!((bridge.transport(), bridge.name().unwrap().as_ref()), (Transport::Snowflake, "app.datapacket.com"));
    let names: Vec<_> = bridge.stun().iter().map(AsRef::as_ref).collect();
    assert_eq!(names, ["stun.antisip.com", "stun.epygi.com", "stun.nextcloud.com", "stun.uls.co.za"]);
    // What a client of 2022 understands.
    let says = bridge.to_string();
    assert_eq!(says, SNOWFLAKE.replace("fronts=app.datapacket.com,www.datapacket.com", "front=app.datapacket.com"));
    let url: Bridge = SNOWFLAKE.replace("fronts=app.datapacket.com,www.datapacket.com", "max=2").parse().unwrap();
    assert_eq!(url.name().unwrap().as_ref(), "1098762253.rsc.cdn77.org", "without a front the broker itself");

    let line = |more: &str| format!("snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b.example:3478 {more}");
    let is = |text: &str, says| table::<Bridge>(&[(text, says)]);
    for good in [
        "",
        "max=9",
        "utls-nosni=yes",
        "front=c.example",
        "fronts=c.example",
        "fingerprint=0123456789abcdef0123456789abcdef01234567",
    ] {
        is(&line(good), None);
    }
    for (bad, says) in [
        ("max=0", "value of max="),
        ("max=10", "value of max="),
        ("max=1;x", "value of max="),
        ("utls-nosni=1", "value of utls-nosni="),
        ("utls-imitate=a-b", "value of utls-imitate="),
        ("front=", "value of front="),
        ("front=192.0.2.1", "value of front="),
        ("fronts=a.example,", "value of fronts="),
        ("fronts=a.example;b=c", "value of fronts="),
        ("fronts=a.example front=b.example", "front= stands in it twice"),
        ("fingerprint=0123", "value of fingerprint="),
        ("fingerprint=$0123456789abcdef0123456789abcdef01234567", "value of fingerprint="),
        ("ampcache=https://a.example/", "ampcache= is not known"),
        ("log=/state/x", "log= is not known"),
        ("unsafe-logging=true", "unsafe-logging= is not known"),
        ("keep-local-addresses=true", "keep-local-addresses= is not known"),
        ("cert=a", "cert= is not known"),
        ("url=https://c.example/", "url= stands in it twice"),
    ] {
        is(&line(bad), Some(says));
    }
    for bad in [
        "b.example:3478",
        "stun:",
        "stun:b.example:0",
        "stun:b.example:+1",
        "stun:b.example:65536",
        "stun:b.example:1:2",
        "stun:a_,",
        "turn:b.example:3478",
        "stun://b.example",
        "stun:[2001:db8::1]:3478",
        "stun:127.0.0.1:9050",
        "stun:0.0.0.0:1",
        "stun:224.0.0.251:5353",
        "stun:b.example:3478?transport=tcp",
        "stun:b.example,",
    ] {
        is(&line("").replace("stun:b.example:3478", bad), Some("value of ice="));
    }
    is(&line("").replace("https://", "http://"), Some("value of url="));
    is(&line("").replace("url=https://a.example/ ", ""), Some("url= is missing"));
    is(&line("").replace("ice=stun:b.example:3478", ""), Some("ice= is missing"));
    is(&line("").replace("snowflake", "meek_lite"), Some("ice= is not known"));
    let servers = |count: usize| line("").replace("stun:b.example:3478", &vec!["stun:b.example"; count].join(","));
    is(&servers(16), None);
    is(&servers(17), Some("value of ice="));
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
        ("snowflake", Transport::Snowflake),
    ] {
        assert_eq!(word.parse(), Ok(is));
    }
    table::<Transport>(&[("Snowflake", Some("is no transport")), ("tor", Some("use none, obfs4, meek or snowflake"))]);
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
    assert!(!config.tor.udp());
    config.proxy =
        Some(Proxy { kind: proxy::Kind::Socks5, address: "198.51.100.1:1080".parse().unwrap(), login: None });
    assert_eq!(config.contacts(), Some(vec!["198.51.100.1:1080".parse().unwrap()]));
}

#[test]
fn snowflake_contacts_its_front_and_whom_nobody_knows_before() {
    let mut config = config(bridges_of(&["obfs4 192.0.2.1:443 cert=a", SNOWFLAKE]));
    assert!(config.tor.udp());
    let host = |name: &str, address| Host { name: name.parse().unwrap(), address };
    let hosts =
        vec![host("app.datapacket.com", [203, 0, 113, 1].into()), host("stun.epygi.com", [203, 0, 113, 2].into())];
    config.hosts = hosts.try_into().unwrap();
    let tcp = ["192.0.2.1:443", "203.0.113.1:443"].map(|address| address.parse().unwrap());
    assert_eq!(config.contacts(), Some(tcp.to_vec()), "STUN is no TCP");
    assert_eq!(config.tor.names().count(), 1);
    assert_eq!(config.tor.stun().count(), 4);
    assert!(config.tor.notes()[0].contains("by UDP"), "{:?}", config.tor.notes());
    for others in [&["obfs4 192.0.2.1:443 cert=a", "192.0.2.1:443"][..], &[]] {
        assert!(!TorSettings { entry: bridges_of(others), ..TorSettings::default() }.udp());
    }
    assert!(!TorSettings::default().udp());
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
    let bridge = format!(
        "snowflake 192.0.2.1:443 {FP} url=https://{}/ ice={}",
        "a.".repeat(123) + "b",
        vec!["stun:192.0.2.1"; 16].join(",")
    );
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
