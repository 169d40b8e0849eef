#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;
use proxyvpn_torvm::config::Bridge;

use super::*;
use crate::config::parse::profile;
use crate::config::profile::{PasswordSource, Profile};

const FP: &str = "0123456789ABCDEF0123456789ABCDEF01234567";

fn read(text: &str) -> Result<Profile, ConfigError> {
    profile("tor", "tor.toml", &format!("backend = \"torvm\"\n{text}"))
}

fn spec(text: &str) -> TorVmSpec {
    read(&format!("[torvm]\n{text}")).unwrap().torvm.unwrap()
}

#[test]
fn a_minimal_profile_has_the_documented_defaults() {
    let full = r#"
[upstream]
url = "direct://"
[tun]
name = "torvm0"
[dns]
servers = []
[protect]
killswitch = true
inbound-replies = true
lan = []
forward = "block"
[bypass]
users = []
[torvm]
memory-mib = 256
accel = "auto"
transport = "none"
bridges = []
entry-nodes = []
exit-nodes = []
exit-country = ""
exclude-nodes = []
exclude-exit-nodes = []
strict-nodes = false
proxy-username = ""
testing = false
directory-authorities = []
tor-log = "notice"
"#;
    let minimal = read("").unwrap();
    let example = include_str!("../../../docs/examples/torvm.toml");
    assert_eq!(profile("tor", "torvm.toml", example).unwrap(), minimal, "the example shows other defaults");
    assert_eq!(minimal, read(full).unwrap());
    assert_eq!(minimal.torvm, Some(TorVmSpec::default()));
    let tun = &minimal.tun;
    assert_eq!((tun.name.as_str(), tun.cidr.to_string().as_str(), tun.mtu), ("torvm0", "10.10.10.2/30", 1500));
    assert!(minimal.notes().is_empty());
}

#[test]
fn every_key_arrives() {
    let profile = read(&format!(
        r#"
[upstream]
url = "http://ann@proxy.example:3128"
[tun]
name = "tor7"
[torvm]
memory-mib = 512
accel = "tcg"
transport = "obfs4"
bridges = ["obfs4 192.0.2.1:443 {FP} cert=abc iat-mode=0", "obfs4 192.0.2.2:443 cert=x"]
exit-nodes = ["{{us}}", "{FP}"]
exit-country = "DE"
exclude-nodes = ["{{cn}}"]
exclude-exit-nodes = ["${FP}"]
strict-nodes = true
socks5-proxy = "socks.example:1080"
proxy-username = "bob"
proxy-password-credential = "tor-proxy"
testing = true
directory-authorities = ["auth1 orport=9001 no-v2 v3ident={FP} 11.0.0.1:9030 {FP}"]
tor-log = "info"
"#
    ))
    .unwrap();
    assert_eq!((profile.tun.name.as_str(), profile.upstream.port), ("tor7", 3128));
    let torvm = profile.torvm.as_ref().unwrap();
    assert_eq!((torvm.memory_mib, torvm.accel, torvm.tor.log), (512, Some(Accelerator::Tcg), LogLevel::Info));
    assert_eq!(torvm.tor.bridges().len(), 2);
    assert_eq!(torvm.tor.transport(), Transport::Obfs4);
    let texts = |nodes: &[Node]| nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(texts(&torvm.tor.exit_nodes), format!("{{us}},${FP},{{de}}"));
    assert_eq!(texts(&torvm.tor.exclude_nodes), "{cn}");
    assert_eq!(texts(&torvm.tor.exclude_exit_nodes), format!("${FP}"));
    assert!(torvm.tor.strict_nodes);
    let proxy = torvm.proxy.as_ref().unwrap();
    assert_eq!((proxy.kind, proxy.host.as_str(), proxy.port), (Kind::Socks5, "socks.example", 1080));
    assert_eq!(proxy.username.as_deref(), Some("bob"));
    assert_eq!(proxy.password, Some(PasswordSource::Credential("tor-proxy".to_owned())));
    let network = torvm.tor.network.as_ref().unwrap();
    assert_eq!((network.testing, network.authorities.len()), (true, 1));
    let notes = profile.notes();
    assert!(notes[0].contains("{de}") && notes[0].contains("easier to recognise"), "{notes:?}");
    assert!(notes[1].contains("not the public Tor network"), "{notes:?}");
    let entry = spec("entry-nodes = [\"{at}\"]").tor.entry;
    assert!(matches!(&entry, Entry::Nodes(nodes) if nodes.len() == 1), "{entry:?}");
}

#[test]
fn what_proxyctl_makes_of_the_forerunners_json_is_a_profile() {
    let text = include_str!("../../../cli/tests/data/torvm.toml");
    let torvm = profile("tor", "tor.toml", text).unwrap().torvm.unwrap();
    assert_eq!((torvm.memory_mib, torvm.accel, torvm.tor.bridges().len()), (512, Some(Accelerator::Tcg), 2));
    assert_eq!(torvm.proxy.unwrap().username.as_deref(), Some("\"ann\""));
}

#[test]
fn without_a_word_for_the_transport_the_lines_say_it() {
    let meek = "meek_lite 192.0.2.20:80 url=https://a.example front=b.example";
    assert_eq!(spec(&format!("bridges = [\"{meek}\"]")).tor.transport(), Transport::Meek);
    assert_eq!(spec(&format!("transport = \"meek-azure\"\nbridges = [\"{meek}\"]")).tor.transport(), Transport::Meek);
    let snowflake = "snowflake [2001:db8::1]:80 url=https://a.example/ ice=stun:b";
    for upstream in ["", "[upstream]\nurl = \"direct://\"\n"] {
        let profile =
            read(&format!("{upstream}[torvm]\ntransport = \"snowflake\"\nbridges = [\"{snowflake}\"]")).unwrap();
        assert!(profile.torvm.as_ref().unwrap().tor.udp());
        assert!(profile.notes()[0].contains("volunteers"), "{:?}", profile.notes());
    }
    let gone = meek.replace("b.example", "ajax.aspnetcdn.com");
    let profile = read(&format!("[torvm]\nbridges = [\"{gone}\"]")).unwrap();
    assert!(profile.notes()[0].contains("is gone"), "{:?}", profile.notes());
}

#[test]
fn an_error_names_the_line_and_what_to_do() {
    let rows: &[(&str, &str, &str)] = &[
        ("[tun]\ncidr = \"10.9.0.1/30\"\n", "3:8", "fixed address (10.10.10.2/30)"),
        ("[tun]\ncidr6 = \"fd00::1/64\"\n", "3:9", "remove this key"),
        ("[tun]\nmtu = 1400\n", "3:7", "remove this key"),
        ("[tun]\nname = \"a/b\"\n", "3:8", "device's name"),
        ("[dns]\nmode = \"bypass\"\n", "3:8", "all names go through Tor"),
        ("[protect]\nforward = \"tunnel\"\n", "3:11", "nothing is forwarded"),
        ("[torvm]\nmemory = 1\n", "3:1", "unknown key `memory`"),
        ("[torvm]\nmemory-mib = 127\n", "3:14", "use 128 to 4096"),
        ("[torvm]\nmemory-mib = 4097\n", "3:14", "use 128 to 4096"),
        ("[torvm]\nmemory-mib = -1\n", "3:14", "use 128 to 4096"),
        ("[torvm]\nmemory-mib = \"256\"\n", "3:14", "expected a whole number"),
        ("[torvm]\naccel = \"xen\"\n", "3:9", "use \"auto\" or \"kvm\" or \"tcg\""),
        ("[torvm]\ntransport = \"snowflake\"\n", "3:13", "needs bridges"),
        ("[torvm]\ntransport = \"webtunnel\"\n", "3:13", "use none, obfs4, meek or snowflake"),
        (
            "[upstream]\nurl = \"http://a:1\"\n[torvm]\nbridges = [\"snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b\"]\n",
            "3:7",
            "use obfs4 or meek bridges, or direct://",
        ),
        (
            "[torvm]\nbridges = [\"192.0.2.1:1\", \"snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b\"]\nsocks5-proxy = \"a:1\"\n",
            "4:16",
            "use obfs4 or meek bridges, or remove this key",
        ),
        (
            "[torvm]\nbridges = [\"snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b\"]\nhttps-proxy = \"a:1\"\n",
            "4:15",
            "goes through no proxy",
        ),
        (
            "[torvm]\ntransport = \"obfs4\"\nbridges = [\"snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b\"]\n",
            "4:12",
            "reached by the transport snowflake",
        ),
        ("[torvm]\ntransport = \"obfs4\"\n", "3:13", "needs bridges"),
        (
            "[torvm]\ntransport = \"none\"\nbridges = [\"obfs4 192.0.2.1:1 cert=a\"]\n",
            "4:12",
            "reached by the transport obfs4",
        ),
        ("[torvm]\ntransport = \"obfs4\"\nbridges = [\"192.0.2.1:1\"]\n", "4:12", "reached by no transport"),
        ("[torvm]\nbridges = [\"192.0.2.1:1\", \"\"]\n", "3:27", "is not a bridge"),
        ("[torvm]\nbridges = [\"192.0.2.1:1\\nLog debug file /x\"]\n", "3:12", "not of plain words"),
        ("[torvm]\nbridges = [\"[2001:db8::1]:443\"]\n", "3:12", "IPv4 only"),
        ("[torvm]\nbridges = [\"192.0.2.1:1\"]\nentry-nodes = [\"{de}\"]\n", "4:16", "remove entry-nodes or bridges"),
        ("[torvm]\nexit-nodes = [\"de\"]\n", "3:15", "such as {de}"),
        ("[torvm]\nexit-country = \"{de}\"\n", "3:16", "two letters"),
        ("[torvm]\nhttps-proxy = \"a:1\"\nsocks5-proxy = \"b:1\"\n", "4:16", "exclude each other"),
        ("[torvm]\nhttps-proxy = \"a\"\n", "3:15", "port is missing"),
        ("[torvm]\nhttps-proxy = \"http://a:1\"\n", "3:15", "as host:port"),
        ("[torvm]\nhttps-proxy = \"me:hunter2@a:1\"\n", "3:15", "keys of their own"),
        ("[torvm]\nhttps-proxy = \"[2001:db8::1]:1\"\n", "3:15", "IPv4 only"),
        ("[torvm]\nproxy-username = \"u\"\n", "3:18", "add https-proxy or socks5-proxy"),
        ("[torvm]\nproxy-password-file = \"/p\"\n", "3:23", "add https-proxy or socks5-proxy"),
        ("[torvm]\nhttps-proxy = \"a:1\"\nproxy-password-file = \"/p\"\n", "4:23", "add proxy-username"),
        ("[torvm]\nhttps-proxy = \"a:1\"\nproxy-username = \"u\"\n", "4:18", "only with a password"),
        (
            "[torvm]\nhttps-proxy = \"a:1\"\nproxy-username = \"u:v\"\nproxy-password-file = \"/p\"\n",
            "4:18",
            "without colon",
        ),
        (
            "[torvm]\nhttps-proxy = \"a:1\"\nproxy-username = \"u\"\nproxy-password-file = \"p\"\n",
            "5:23",
            "proxy-password-file needs the whole path",
        ),
        (
            "[torvm]\nhttps-proxy = \"a:1\"\nproxy-username = \"u\"\nproxy-password-file = \"/p\"\nproxy-password-credential = \"p\"\n",
            "6:29",
            "proxy-password-file and proxy-password-credential exclude each other",
        ),
        ("[torvm]\ntesting = true\n", "3:11", "needs directory-authorities"),
        ("[torvm]\ndirectory-authorities = [\"x\"]\n", "3:26", "not a directory authority"),
        ("[torvm]\ntor-log = \"debug\"\n", "3:11", "use \"warn\" or \"notice\" or \"info\""),
    ];
    for (text, place, says) in rows {
        let error = match read(text) {
            Err(error) => error.to_string(),
            Ok(profile) => panic!("{text:?} was accepted: {profile:?}"),
        };
        assert!(error.starts_with(&format!("tor.toml:{place}: ")), "{text:?}: {error}");
        assert!(error.contains(says) && !error.contains("hunter2"), "{text:?}: {error}");
    }
}

#[test]
fn lists_are_bounded() {
    let many = |text: &str, count: usize| vec![format!("\"{text}\""); count].join(", ");
    let bridges = format!("[torvm]\nbridges = [{}]\n", many("192.0.2.1:1", MAX_BRIDGES + 1));
    assert!(read(&bridges).unwrap_err().to_string().contains("bridges has more than 16 entries"));
    let nodes: Vec<_> = (0..MAX_NODES).map(|number| format!("\"{number:040X}\"")).collect();
    let full = format!("[torvm]\nexit-nodes = [{}]\n", nodes.join(", "));
    assert_eq!(read(&full).unwrap().torvm.unwrap().tor.exit_nodes.len(), MAX_NODES);
    let error = read(&format!("{full}exit-country = \"de\"\n")).unwrap_err().to_string();
    assert!(error.starts_with("tor.toml:4:16: more than 64 entries"), "{error}");
}

/// A TOML string of any text.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

proptest! {
    #[test]
    fn what_a_profile_takes_the_contract_takes(text in any::<String>(), key in 0..6usize) {
        let (key, list) = [
            ("bridges", true), ("exit-nodes", true), ("exclude-nodes", true), ("exit-country", false), ("https-proxy", false),
            ("directory-authorities", true),
        ][key];
        let value = if list { format!("[{}]", quoted(&text)) } else { quoted(&text) };
        if let Ok(profile) = read(&format!("[torvm]\n{key} = {value}\n")) {
            let torvm = profile.torvm.unwrap();
            let good = match key {
                "bridges" => text.parse::<Bridge>().is_ok(),
                "exit-country" => text.is_empty() || text.parse::<Country>().is_ok(),
                "https-proxy" => torvm.proxy.is_some_and(|proxy| !proxy.host.contains(char::is_whitespace)),
                "directory-authorities" => text.parse::<DirAuthority>().is_ok(),
                _ => text.parse::<Node>().is_ok(),
            };
            prop_assert!(good, "{} = {}", key, value);
        }
    }
}
