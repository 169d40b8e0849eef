#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::config::{Bridge, DirAuthority, HashedPassword, List, LogLevel, Login, Network};

const FP: &str = "0123456789ABCDEF0123456789ABCDEF01234567";
const OBFS4: &str = "obfs4 192.0.2.1:443 0123456789abcdef0123456789abcdef01234567 cert=ab/+= iat-mode=0";
const MEEK: &str =
    "meek_lite 0.0.2.0:2 url=https://meek.example.org/path front=www.example.org utls=HelloRandomizedALPN";
const SNOWFLAKE: &str = "snowflake 192.0.2.3:80 0123456789abcdef0123456789abcdef01234567 fingerprint=0123456789ABCDEF0123456789ABCDEF01234567 \
     url=https://broker.example.org/ fronts=www.example.org,b.example ice=stun:a.example:3478,stun:192.0.2.9 utls-imitate=hellorandomizedalpn";
const AUTHORITY: &str = "auth1 orport=9001 no-v2 v3ident=D586D18309DED4CD6D57C18FDB97EFA96D330566 11.0.0.1:9030 \
                         0123 4567 89AB CDEF 0123  4567 89AB CDEF 0123 4567";

fn config() -> GuestConfig {
    let control_password = HashedPassword::try_from(format!("16:{}", "0A".repeat(29))).unwrap();
    GuestConfig { control_password, tor: TorSettings::default(), proxy: None, hosts: List::default() }
}

fn list<T: std::str::FromStr<Err = crate::config::Rejected>, const N: usize>(texts: &[&str]) -> List<T, N> {
    texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<T>>().try_into().unwrap()
}

fn proxy(kind: Kind, user: &str, password: &str) -> Proxy {
    let login = Login { user: user.to_owned().try_into().unwrap(), password: password.to_owned().try_into().unwrap() };
    Proxy { kind, address: "192.0.2.9:3128".parse().unwrap(), login: Some(login) }
}

/// Each field that a profile can set, alone and with what it may stand beside.
fn variants() -> Vec<(&'static str, GuestConfig, Vec<&'static str>)> {
    let mut all = Vec::new();
    let mut with = |name, change: fn(&mut GuestConfig), lines: &[&'static str]| {
        let mut config = config();
        change(&mut config);
        all.push((name, config, lines.to_vec()));
    };
    with("plain", |_| {}, &["NoExec 1", "Sandbox 1"]);
    with(
        "bridges without transport",
        |c| {
            c.tor.entry =
                Entry::Bridges(list(&["192.0.2.1:443", "[2001:db8::1]:9001 0123456789ABCDEF0123456789abcdef01234567"]))
        },
        &[
            "Bridge 192.0.2.1:443",
            "Bridge [2001:db8::1]:9001 0123456789ABCDEF0123456789ABCDEF01234567",
            "NoExec 1",
            "Sandbox 1",
            "UseBridges 1",
        ],
    );
    with(
        "obfs4 and meek behind a proxy",
        |c| {
            c.tor.entry = Entry::Bridges(list(&[OBFS4, MEEK]));
            c.proxy = Some(proxy(Kind::Https, "me", "p#\"\\ %include"));
        },
        &[
            "Bridge meek_lite 0.0.2.0:2 url=https://meek.example.org/path front=www.example.org utls=HelloRandomizedALPN",
            "Bridge obfs4 192.0.2.1:443 0123456789ABCDEF0123456789ABCDEF01234567 cert=ab/+= iat-mode=0",
            "ClientTransportPlugin meek_lite,obfs4 exec /usr/bin/obfs4proxy",
            "HTTPSProxy 192.0.2.9:3128",
            "HTTPSProxyAuthenticator me:p#\"\\ %include",
            "UseBridges 1",
        ],
    );
    with(
        "snowflake alone",
        |c| c.tor.entry = Entry::Bridges(list(&[SNOWFLAKE])),
        &[
            "Bridge snowflake 192.0.2.3:80 0123456789ABCDEF0123456789ABCDEF01234567 fingerprint=0123456789ABCDEF0123456789ABCDEF01234567 \
             url=https://broker.example.org/ front=www.example.org ice=stun:a.example:3478,stun:192.0.2.9 utls-imitate=hellorandomizedalpn",
            "ClientTransportPlugin snowflake exec /usr/bin/snowflake-client",
            "UseBridges 1",
        ],
    );
    with(
        "all transports",
        |c| {
            c.tor.entry =
                Entry::Bridges(list(&["snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:a.example", OBFS4, MEEK]))
        },
        &[
            "Bridge meek_lite 0.0.2.0:2 url=https://meek.example.org/path front=www.example.org utls=HelloRandomizedALPN",
            "Bridge obfs4 192.0.2.1:443 0123456789ABCDEF0123456789ABCDEF01234567 cert=ab/+= iat-mode=0",
            "Bridge snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:a.example",
            "ClientTransportPlugin meek_lite,obfs4 exec /usr/bin/obfs4proxy",
            "ClientTransportPlugin snowflake exec /usr/bin/snowflake-client",
            "UseBridges 1",
        ],
    );
    with(
        "nodes",
        |c| {
            c.tor.entry = Entry::Nodes(list(&["{AT}", FP]));
            c.tor.exit_nodes = list(&["{de}", "{us}"]);
            c.tor.exclude_nodes = list(&["{cn}"]);
            c.tor.exclude_exit_nodes = list(&[FP]);
            c.tor.strict_nodes = true;
            c.tor.log = LogLevel::Warn;
        },
        &[
            "EntryNodes {at},$0123456789ABCDEF0123456789ABCDEF01234567",
            "ExcludeExitNodes $0123456789ABCDEF0123456789ABCDEF01234567",
            "ExcludeNodes {cn}",
            "ExitNodes {de},{us}",
            "GeoIPFile /usr/share/torvm/geoip",
            "NoExec 1",
            "Sandbox 1",
            "StrictNodes 1",
        ],
    );
    with(
        "a network for tests",
        |c| c.tor.network = Some(Network { authorities: list(&[AUTHORITY]), testing: true }),
        &[
            "DirAuthority auth1 orport=9001 v3ident=D586D18309DED4CD6D57C18FDB97EFA96D330566 11.0.0.1:9030 \
             0123456789ABCDEF0123456789ABCDEF01234567",
            "NoExec 1",
            "Sandbox 1",
            "TestingTorNetwork 1",
        ],
    );
    with(
        "SOCKS 5",
        |c| c.proxy = Some(proxy(Kind::Socks5, "mé", "ä\u{2028}\\n")),
        &[
            "NoExec 1",
            "Sandbox 1",
            "Socks5Proxy 192.0.2.9:3128",
            "Socks5ProxyPassword ä\u{2028}\\n",
            "Socks5ProxyUsername mé",
        ],
    );
    all
}

/// The lines that every configuration has.
fn common(config: &GuestConfig, state: &str) -> Vec<String> {
    [
        &format!("DataDirectory {state}"),
        "SocksPort 10.10.10.1:9050 IsolateSOCKSAuth IsolateDestAddr",
        "TransPort 10.10.10.1:9095",
        "DNSPort 10.10.10.1:9093",
        "ControlPort 10.10.10.1:9051",
        &format!("HashedControlPassword {}", config.control_password.as_ref()),
        "AutomapHostsOnResolve 1",
        "VirtualAddrNetworkIPv4 10.192.0.0/10",
        "ClientRejectInternalAddresses 1",
        "ClientOnly 1",
        "ClientUseIPv6 0",
        "AvoidDiskWrites 1",
        "DormantCanceledByStartup 1",
        "SafeLogging 1",
        &format!("Log {} stdout", config.tor.log),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Undoes [`Quoted`] as Tor does.
fn unquote(line: &str) -> String {
    let Some((key, value)) = line.split_once(" \"") else { return line.to_owned() };
    let mut bytes = Vec::new();
    let mut rest = value.strip_suffix('"').unwrap().split("\\x");
    bytes.extend(rest.next().unwrap().bytes());
    for part in rest {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(part[2..].bytes());
    }
    format!("{key} {}", String::from_utf8(bytes).unwrap())
}

/// A directory for Tor, removed at the end.
struct State(PathBuf);

impl State {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("proxyvpn-torrc-{}-{name}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    /// What Tor says: whether it takes the configuration, and what it understood (`key value`, sorted, without defaults).
    fn tor(&self, torrc: &str) -> (bool, String) {
        let file = self.0.join("torrc");
        fs::write(&file, torrc).unwrap();
        let run = |arguments: &[&str]| {
            Command::new("tor")
                .arg("-f")
                .arg(&file)
                .args(["--defaults-torrc", "/dev/null"])
                .args(arguments)
                .output()
                .expect("tor is there (scripts/setup.sh)")
        };
        let verified = run(&["--verify-config"]);
        let dump = run(&["--hush", "--dump-config", "short"]);
        let said = String::from_utf8_lossy(&verified.stdout).into_owned();
        (
            verified.status.success(),
            if verified.status.success() { String::from_utf8_lossy(&dump.stdout).into_owned() } else { said },
        )
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_variant_has_exactly_its_lines() {
    for (name, config, mut expected) in variants() {
        let common = common(&config, "/state");
        expected.extend(common.iter().map(String::as_str));
        expected.sort_unstable();
        let text = render(&config, "/state");
        let mut got: Vec<String> = text.lines().map(unquote).collect();
        got.sort_unstable();
        assert_eq!(got, expected, "{name}");
    }
}

#[test]
fn tor_takes_every_variant_and_understands_what_was_meant() {
    for (index, (name, config, expected)) in variants().into_iter().enumerate() {
        let state = State::new(&index.to_string());
        let (good, says) = state.tor(&render(&config, state.0.to_str().unwrap()));
        assert!(good, "{name}: {says}");
        // What it quotes has a test of its own.
        for line in expected.iter().filter(|line| !line.contains(['#', 'é', '\u{2028}'])) {
            assert!(says.lines().any(|said| said == *line), "{name}: {line} is not in {says}");
        }
    }
    let state = State::new("bad");
    let (good, says) = state.tor(&format!("{}Nonsense 1\n", render(&config(), state.0.to_str().unwrap())));
    assert!(!good && says.contains("Unknown option 'Nonsense'"), "the check sees nothing: {says}");
}

#[test]
fn an_impossible_choice_makes_tor_stop_instead_of_going_elsewhere() {
    let state = State::new("impossible");
    for change in [
        |c: &mut GuestConfig| c.tor.entry = Entry::Bridges(List::default()),
        |c: &mut GuestConfig| c.tor.network = Some(Network { authorities: List::default(), testing: true }),
    ] {
        let mut config = config();
        change(&mut config);
        let (good, says) = state.tor(&render(&config, state.0.to_str().unwrap()));
        assert!(!good, "{says}");
    }
}

/// Texts that try to be more than one value.
fn hostile() -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        "\n",
        "\r",
        "\0",
        "\"",
        "'",
        "\\",
        "%include /etc/passwd",
        "#",
        " ",
        "\t",
        "Log debug file /x",
        "Sandbox 0",
        "=",
        ",",
        "{",
        "}",
        "$",
        "ä",
        "\u{85}",
        "\u{2028}",
        "192.0.2.1:443",
        "obfs4",
        "cert=",
        FP,
        "{de}",
        "1",
        "x",
        ":",
        "[",
        "]",
        "url=https://a.b",
        "snowflake 192.0.2.3:80 url=https://a.b ice=stun:a",
        " ice=stun:a.b:1,stun:",
        " fronts=a,b",
        " fingerprint=",
        " max=",
        " utls-imitate=",
        " utls-nosni=true",
        "orport=1",
        "v3ident=",
    ]);
    prop_oneof![
        prop::collection::vec(parts, 0..8).prop_map(|parts| parts.concat()),
        any::<String>(),
        // Something good with something in it.
        (
            prop::sample::select(vec![OBFS4, MEEK, SNOWFLAKE, AUTHORITY, FP, "{de}", "192.0.2.1:443"]),
            0..300usize,
            prop_oneof![any::<char>(), prop::sample::select(vec!['\n', '\0', '"', '%', '#', ',', ' ', ';'])]
        )
            .prop_map(|(good, at, c)| {
                let mut text = good.to_owned();
                text.insert(at.min(good.len()), c);
                text
            }),
        Just("x".repeat(100_000)),
    ]
}

/// Characters that a value outside quotes may have.
fn plain(line: &str) -> bool {
    line.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') && !line.contains(['"', '\\', '#', '\''])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_adds_a_line_or_a_key(text in hostile()) {
        let mut config = config();
        let mut expected = 0;
        if let Ok(bridge) = text.parse::<Bridge>() {
            // A transport comes with one line in the place of two.
            expected += if bridge.transport().plugin().is_some() { 1 } else { 2 };
            config.tor.entry = Entry::Bridges(vec![bridge].try_into().unwrap());
        }
        if let Ok(node) = text.parse::<Node>() {
            // GeoIP's line comes with a country.
            expected += if matches!(node, Node::Country(_)) { 2 } else { 1 };
            config.tor.exit_nodes = vec![node].try_into().unwrap();
        }
        if let Ok(authority) = text.parse::<DirAuthority>() {
            config.tor.network = Some(Network { authorities: vec![authority].try_into().unwrap(), testing: false });
            expected += 1;
        }
        let rendered = render(&config, "/state");
        let allowed: &[&str] = &[
            "DataDirectory", "SocksPort", "TransPort", "DNSPort", "ControlPort", "HashedControlPassword", "AutomapHostsOnResolve",
            "VirtualAddrNetworkIPv4", "ClientRejectInternalAddresses", "ClientOnly", "ClientUseIPv6", "AvoidDiskWrites",
            "DormantCanceledByStartup", "SafeLogging", "Log", "NoExec", "Sandbox", "ClientTransportPlugin", "Bridge", "UseBridges",
            "ExitNodes", "GeoIPFile", "DirAuthority",
        ];
        prop_assert_eq!(rendered.lines().count(), 17 + expected);
        for line in rendered.lines() {
            prop_assert!(plain(line), "{}", line);
            prop_assert!(allowed.contains(&line.split(' ').next().unwrap()), "{}", line);
        }
        prop_assert!(rendered.bytes().all(|byte| byte == b'\n' || byte == b' ' || byte.is_ascii_graphic()));
    }

    #[test]
    fn what_is_accepted_is_read_again_as_the_same(text in hostile()) {
        if let Ok(bridge) = text.parse::<Bridge>() {
            prop_assert_eq!(bridge.to_string().parse::<Bridge>().unwrap(), bridge);
        }
        if let Ok(authority) = text.parse::<DirAuthority>() {
            prop_assert_eq!(authority.to_string().parse::<DirAuthority>().unwrap(), authority);
        }
        if let Ok(node) = text.parse::<Node>() {
            prop_assert_eq!(node.to_string().parse::<Node>().unwrap(), node);
        }
    }

    #[test]
    fn a_login_stays_one_quoted_value(user in hostile(), password in hostile()) {
        let login = |text: &str| Some((text.to_owned().try_into().ok()?, password.clone().try_into().ok()?));
        if let Some((user, password)) = login(&user) {
            for kind in [Kind::Https, Kind::Socks5] {
                let login = Some(Login { user: Clone::clone(&user), password: Clone::clone(&password) });
                let config = GuestConfig { proxy: Some(Proxy { kind, address: "192.0.2.9:1".parse().unwrap(), login }), ..config() };
                let rendered = render(&config, "/state");
                prop_assert_eq!(rendered.lines().count(), if kind == Kind::Https { 19 } else { 20 });
                for line in rendered.lines() {
                    if let Some((key, value)) = line.split_once(" \"") {
                        prop_assert!(["HTTPSProxyAuthenticator", "Socks5ProxyUsername", "Socks5ProxyPassword"].contains(&key));
                        let value = value.strip_suffix('"').unwrap();
                        prop_assert!(value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'\\'), "{}", value);
                    } else {
                        prop_assert!(plain(line), "{}", line);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tor_reads_the_password_that_was_given(password in "[ -~]{1,255}") {
        let state = State::new("password");
        let config = GuestConfig { proxy: Some(proxy(Kind::Socks5, "me", &password)), ..config() };
        let (good, says) = state.tor(&render(&config, state.0.to_str().unwrap()));
        prop_assert!(good, "{}", says);
        let said = says.lines().find_map(|line| line.strip_prefix("Socks5ProxyPassword ")).unwrap_or_default();
        // Tor writes in quotes what begins with one or has a #.
        let quoted = said.starts_with('"').then(|| said[1..said.len() - 1].replace("\\\\", "\0").replace('\\', "").replace('\0', "\\"));
        prop_assert_eq!(quoted.as_deref().unwrap_or(said), password);
    }
}
