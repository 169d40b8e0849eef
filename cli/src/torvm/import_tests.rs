#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;

use super::*;

fn table(json: &str) -> (Table, Vec<String>) {
    let converted = convert(json.as_bytes(), "tor").unwrap();
    (converted.text.parse().unwrap(), converted.notes)
}

#[test]
fn the_defaults_of_the_forerunner_become_ours() {
    let json = include_str!("../../tests/data/torvm-defaults.json");
    let converted = convert(json.as_bytes(), "tor").unwrap();
    assert_eq!(converted.text, "backend = \"torvm\"\n");
    let [paths, memory] = converted.notes.as_slice() else { panic!("{:?}", converted.notes) };
    assert!(paths.ends_with("kernel_path, initrd_path, state_disk_path, qmp_socket_path"), "{paths}");
    assert!(memory.contains("128 MiB are too few"), "{memory}");
    assert_eq!(convert(b"{}", "tor").unwrap().text, converted.text);
}

#[test]
fn everything_that_can_be_taken_arrives() {
    let json = include_str!("../../tests/data/torvm.json");
    let converted = convert(json.as_bytes(), "tor").unwrap();
    // The daemon's tests read the same file as a profile.
    assert_eq!(converted.text, include_str!("../../tests/data/torvm.toml"));
    for what in [
        "host_ip is not taken",
        "dns1 is not taken",
        "socks_port is not taken",
        "vm_cpus is not taken",
        "verbose",
        "run_at_load",
        "retry_enabled",
        "initrd_path",
        "/etc/proxyvpn/tor.password",
        "ajax.aspnetcdn.com is gone",
    ] {
        assert!(converted.notes.iter().any(|note| note.contains(what)), "{what}: {:?}", converted.notes);
    }
    assert!(!format!("{converted:?}").contains("hunter2"));
}

#[test]
fn an_error_names_the_field() {
    for (json, says) in [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ("{", "EOF"),
        ("{\"tap_name\": \"torvm0\", \"tap_name\": \"x\"}", "duplicate field `tap_name`"),
        ("{\"kernel\": \"x\"}", "unknown field `kernel`"),
        ("{\"bridge\": {\"bridge\": []}}", "unknown field `bridge`"),
        ("{\"proxy\": {\"pass\": \"hunter2\"}}", "unknown field `pass`"),
        ("{\"config_version\": 2}", "config_version"),
        ("{\"tap_name\": \"\"}", "tap_name"),
        ("{\"tap_name\": \"TorVM Tap\"}", "tap_name"),
        ("{\"tap_name\": \"tap0\\nkillswitch = false\"}", "tap_name: \"tap0\\nkill"),
        ("{\"host_ip\": \"10.10.10.2; reboot\"}", "host_ip"),
        ("{\"subnet_mask\": \"/30\"}", "subnet_mask"),
        ("{\"dns2\": \"resolver\"}", "dns2"),
        ("{\"socks_port\": 0}", "socks_port"),
        ("{\"trans_port\": 70000}", "invalid value"),
        ("{\"vm_memory_mb\": 4097}", "vm_memory_mb"),
        ("{\"vm_cpus\": 0}", "vm_cpus"),
        ("{\"kernel_path\": \"/boot/vmlinuz\\u0000x\"}", "kernel_path"),
        ("{\"qmp_socket_path\": \"\"}", "qmp_socket_path"),
        ("{\"accel\": \"kvm,-device x\"}", "accel"),
        ("{\"bridge\": {\"use_bridges\": true, \"transport\": \"obfs4\"}}", "bridge.bridges"),
        (
            "{\"bridge\": {\"use_bridges\": true, \"transport\": \"snowflake\", \"bridges\": [\"x\"]}}",
            "bridge.bridges[0]: \"x\" is not a bridge",
        ),
        ("{\"bridge\": {\"transport\": \"scramblesuit\"}}", "bridge.transport"),
        (
            "{\"bridge\": {\"use_bridges\": true, \"bridges\": [\"192.0.2.1:1\\n%include /etc/passwd\"]}}",
            "bridge.bridges[0]",
        ),
        ("{\"bridge\": {\"use_bridges\": true, \"bridges\": [\"obfs4 192.0.2.1:1 cert=a\"]}}", "reached by obfs4"),
        ("{\"proxy\": {\"type\": \"http\", \"address\": \"a:1\"}}", "write https"),
        ("{\"proxy\": {\"type\": \"ftp\", \"address\": \"a:1\"}}", "proxy.type"),
        ("{\"proxy\": {\"type\": \"https\", \"address\": \"me:hunter2@a:1\"}}", "proxy.address"),
        ("{\"proxy\": {\"type\": \"https\", \"address\": \"a:+1\"}}", "proxy.address"),
        ("{\"proxy\": {\"type\": \"https\", \"address\": \"a:1\", \"password\": \"hunter2\"}}", "needs proxy.username"),
        ("{\"proxy\": {\"type\": \"https\", \"address\": \"a:1\", \"username\": \"u\"}}", "only with proxy.password"),
        (
            "{\"proxy\": {\"type\": \"https\", \"address\": \"a:1\", \"username\": \"u:v\", \"password\": \"hunter2\"}}",
            "proxy.username",
        ),
        ("{\"exit_nodes\": [\"{de}\", \"de\"]}", "exit_nodes[1]"),
    ] {
        let error = convert(json.as_bytes(), "tor").unwrap_err();
        assert!(
            error.contains(says) && !error.contains("hunter2") && !error.contains(char::is_control),
            "{json}: {error}"
        );
    }
}

#[test]
fn snowflake_is_taken() {
    let line = "snowflake 192.0.2.3:80 url=https://a.example/ fronts=b.example,c.example ice=stun:d.example:3478";
    let json = serde_json::json!({"bridge": {"use_bridges": true, "transport": "snowflake", "bridges": [line]}});
    let (table, _) = table(&json.to_string());
    assert_eq!(table["torvm"]["transport"].as_str(), Some("snowflake"));
    let taken = table["torvm"]["bridges"][0].as_str();
    assert_eq!(taken, Some(&*line.replace("fronts=b.example,c.example", "front=b.example")));
}

#[test]
fn bridges_that_were_switched_off_stay_off() {
    let (table, notes) = table("{\"bridge\": {\"transport\": \"snowflake\", \"bridges\": [\"192.0.2.1:443\"]}}");
    assert!(!table.contains_key("torvm"));
    assert!(notes[0].contains("use_bridges is false"), "{notes:?}");
}

#[test]
fn json_is_told_from_toml() {
    assert!(is_json(b"\n {\"a\": 1}"));
    assert!(!is_json(b"backend = \"torvm\"") && !is_json(b""));
}

fn hostile() -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        "\n",
        "\r",
        "\0",
        "\"",
        "'",
        "\\",
        "\"\"\"",
        "'''",
        "%include /etc/passwd",
        "#",
        " ",
        "]",
        "[torvm]",
        "=",
        "killswitch = false",
        "192.0.2.1:443",
        "obfs4 ",
        "cert=",
        "{de}",
        "a",
        "0",
        "ä",
        "\u{2028}",
        ":",
        "1",
    ]);
    prop_oneof![prop::collection::vec(parts, 0..6).prop_map(|parts| parts.concat()), any::<String>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_brings_in_a_key_or_a_value_of_its_own(texts in prop::array::uniform8(hostile()), good in any::<u8>()) {
        let pick = |index: usize, usual: &str| if good & (1 << index) == 0 { texts[index].clone() } else { usual.to_owned() };
        let json = serde_json::json!({
            "tap_name": pick(0, "tap7"),
            "host_ip": pick(1, "10.10.10.2"),
            "kernel_path": pick(2, "dist/vm/vmlinuz"),
            "bridge": {"use_bridges": true, "transport": pick(3, "obfs4"), "bridges": [pick(4, "obfs4 192.0.2.1:443 cert=a")]},
            "proxy": {"type": "socks5", "address": pick(5, "proxy.example:1080"), "username": pick(6, "me"), "password": "hunter2"},
            "exit_nodes": [pick(7, "{de}")],
        });
        match convert(json.to_string().as_bytes(), "tor") {
            Err(error) => prop_assert!(!error.contains(char::is_control) && !error.contains("hunter2"), "{}", error),
            Ok(Converted { text, notes }) => {
                prop_assert!(!text.contains("hunter2") && !notes.concat().contains("hunter2"));
                let profile: Table = text.parse().unwrap();
                let keys = |table: &Table| table.keys().cloned().collect::<Vec<_>>();
                let torvm = profile["torvm"].as_table().unwrap();
                prop_assert!(keys(&profile).iter().all(|key| ["backend", "tun", "torvm"].contains(&key.as_str())));
                let known = ["transport", "bridges", "exit-nodes", "socks5-proxy", "proxy-username", "proxy-password-file"];
                prop_assert!(keys(torvm).iter().all(|key| known.contains(&key.as_str())));
                for line in torvm["bridges"].as_array().unwrap() {
                    prop_assert!(line.as_str().unwrap().parse::<Bridge>().is_ok());
                }
                for node in torvm["exit-nodes"].as_array().unwrap() {
                    prop_assert!(node.as_str().unwrap().parse::<Node>().is_ok());
                }
                prop_assert_eq!(torvm["proxy-username"].as_str().unwrap(), pick(6, "me"));
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in any::<Vec<u8>>()) {
        let _ = convert(&bytes, "tor");
    }
}
