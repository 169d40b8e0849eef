//! Profiles from the JSON of TorVM, proxyvpn's forerunner. Every field is known and checked; what is fixed here is not taken, and said.

use std::net::IpAddr;

use proxyvpn_torvm::config::proxy::User;
use proxyvpn_torvm::config::{Bridge, HostName, MAX_BRIDGES, MAX_NODES, Node, Rejected, Transport};
use serde::Deserialize;
use toml::{Table, Value};

/// A profile, and what its reader should know.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Converted {
    /// The profile's text.
    pub(crate) text: String,
    /// What was not taken, and what is to be done.
    pub(crate) notes: Vec<String>,
}

/// TorVM's `Config`, with the node lists that its torrc may have had.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    config_version: u32,
    tap_name: Option<String>,
    host_ip: Option<String>,
    vm_ip: Option<String>,
    subnet_mask: Option<String>,
    dns1: Option<String>,
    dns2: Option<String>,
    socks_port: Option<u16>,
    control_port: Option<u16>,
    trans_port: Option<u16>,
    dns_port: Option<u16>,
    vm_memory_mb: Option<u32>,
    vm_cpus: Option<u32>,
    kernel_path: Option<String>,
    initrd_path: Option<String>,
    state_disk_path: Option<String>,
    qmp_socket_path: Option<String>,
    verbose: bool,
    accel: String,
    #[serde(rename = "headless")]
    _headless: bool,
    bridge: BridgeConfig,
    proxy: ProxyConfig,
    service: ServiceConfig,
    retry: RetryConfig,
    exit_nodes: Vec<String>,
    entry_nodes: Vec<String>,
    exclude_nodes: Vec<String>,
    strict_nodes: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BridgeConfig {
    use_bridges: bool,
    transport: String,
    /// An empty list may be `null`.
    bridges: Option<Vec<String>>,
}

/// No `Debug`: it may hold a password.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ProxyConfig {
    r#type: String,
    address: String,
    username: String,
    password: String,
}

impl std::fmt::Debug for ProxyConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProxyConfig")
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServiceConfig {
    run_at_load: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RetryConfig {
    retry_enabled: bool,
    #[serde(rename = "retry_max_attempts")]
    _max_attempts: u32,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { retry_enabled: true, _max_attempts: 3 }
    }
}

/// Whether a text is JSON rather than TOML, which cannot begin like that.
pub(crate) fn is_json(content: &[u8]) -> bool {
    content.trim_ascii_start().starts_with(b"{")
}

/// Makes a profile of `json`. `name`: of the profile to be.
///
/// # Errors
/// Not JSON, an unknown field, or a value that is not allowed; the field is named, and no part of a password.
pub(crate) fn convert(json: &[u8], name: &str) -> Result<Converted, String> {
    if !is_json(json) {
        return Err("it is no JSON object".to_owned());
    }
    let config: Config = serde_json::from_slice(json).map_err(|error| plain(&error.to_string()))?;
    if config.config_version > 1 {
        return Err(format!("config_version: version {} is not known", config.config_version));
    }
    let mut notes = Vec::new();
    fixed(&config, &mut notes)?;
    let mut torvm = Table::new();
    machine(&config, &mut torvm, &mut notes)?;
    bridges(&config.bridge, &mut torvm, &mut notes)?;
    nodes(&config, &mut torvm)?;
    proxy(&config.proxy, name, &mut torvm, &mut notes)?;
    let mut profile = Table::from_iter([("backend".to_owned(), Value::from("torvm"))]);
    if let Some(tap) = config.tap_name.filter(|tap| tap != "torvm0") {
        let good = (1..=15).contains(&tap.len()) && tap.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !good || !tap.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(format!(
                "tap_name: \"{}\" is not 1 to 15 letters and digits, with a letter in front",
                plain(&tap)
            ));
        }
        profile.insert("tun".to_owned(), Table::from_iter([("name".to_owned(), Value::from(tap))]).into());
    }
    if !torvm.is_empty() {
        profile.insert("torvm".to_owned(), torvm.into());
    }
    let text = toml::to_string_pretty(&profile).map_err(|error| format!("cannot write the profile: {error}"))?;
    Ok(Converted { text, notes })
}

/// What cannot be chosen here. It must be what it could have been there all the same.
fn fixed(config: &Config, notes: &mut Vec<String>) -> Result<(), String> {
    for (field, value, here) in [
        ("host_ip", &config.host_ip, Some("10.10.10.2")),
        ("vm_ip", &config.vm_ip, Some("10.10.10.1")),
        ("subnet_mask", &config.subnet_mask, Some("255.255.255.252")),
        ("dns1", &config.dns1, None),
        ("dns2", &config.dns2, None),
    ] {
        let Some(value) = value else { continue };
        let address: IpAddr = value.parse().map_err(|_| format!("{field}: \"{}\" is not an address", plain(value)))?;
        match here {
            Some(here) if address.to_string() != here => notes.push(format!("{field} is not taken: it is {here} here")),
            None if !["4.2.2.4", "4.2.2.2"].contains(&value.as_str()) => {
                notes.push(format!("{field} is not taken: all names go through Tor"));
            }
            _ => {}
        }
    }
    for (field, value, here) in [
        ("socks_port", config.socks_port, 9050),
        ("control_port", config.control_port, 9051),
        ("trans_port", config.trans_port, 9095),
        ("dns_port", config.dns_port, 9093),
    ] {
        match value {
            Some(0) => return Err(format!("{field}: 0 is not a port")),
            Some(port) if port != here => notes.push(format!("{field} is not taken: it is {here} here")),
            _ => {}
        }
    }
    let mut paths = Vec::new();
    for (field, path) in [
        ("kernel_path", &config.kernel_path),
        ("initrd_path", &config.initrd_path),
        ("state_disk_path", &config.state_disk_path),
        ("qmp_socket_path", &config.qmp_socket_path),
    ] {
        let Some(path) = path else { continue };
        if path.is_empty() || path.len() > 4096 || path.chars().any(char::is_control) {
            return Err(format!("{field}: \"{}\" is not a path", plain(path)));
        }
        paths.push(field);
    }
    if !paths.is_empty() {
        notes.push(format!("not taken, because image and state belong to the daemon: {}", paths.join(", ")));
    }
    Ok(())
}

fn machine(config: &Config, torvm: &mut Table, notes: &mut Vec<String>) -> Result<(), String> {
    match config.vm_memory_mb {
        None | Some(256) => {}
        Some(memory @ 32..256) => notes.push(format!(
            "vm_memory_mb is not taken: {memory} MiB are too few for the public Tor network; it has 256"
        )),
        Some(memory @ 257..=4096) => _ = torvm.insert("memory-mib".to_owned(), Value::from(memory)),
        Some(memory) => return Err(format!("vm_memory_mb: {memory} is not 32 to 4096")),
    }
    match config.vm_cpus {
        None | Some(1 | 2) => {}
        Some(3..=16) => notes.push("vm_cpus is not taken: the virtual machine has one".to_owned()),
        Some(cpus) => return Err(format!("vm_cpus: {cpus} is not 1 to 16")),
    }
    match config.accel.as_str() {
        "" => {}
        accel @ ("kvm" | "tcg") => _ = torvm.insert("accel".to_owned(), Value::from(accel)),
        accel @ ("hvf" | "whpx") => {
            notes.push(format!("accel is not taken: {accel} belongs to another system; auto finds what works"))
        }
        accel => return Err(format!("accel: \"{}\" is not kvm, tcg, hvf or whpx", plain(accel))),
    }
    if config.verbose {
        notes.push("verbose is not taken: proxyctl connect --verbose does it".to_owned());
    }
    if config.service.run_at_load {
        notes.push("run_at_load is not taken: autoconnect = true in the profile does it".to_owned());
    }
    if !config.retry.retry_enabled {
        notes.push(
            "retry_enabled is not taken: while a connection is wanted, the daemon tries again and nothing leaves"
                .to_owned(),
        );
    }
    Ok(())
}

fn bridges(bridge: &BridgeConfig, torvm: &mut Table, notes: &mut Vec<String>) -> Result<(), String> {
    let field = |rejected: Rejected| rejected.0;
    let transport: Transport = match bridge.transport.as_str() {
        "" => Transport::None,
        word => word.parse().map_err(|error| format!("bridge.transport: {}", field(error)))?,
    };
    let mut lines = Vec::new();
    for (index, line) in bridge.bridges.iter().flatten().enumerate() {
        let line = line.trim_matches(' ');
        if line.is_empty() {
            continue;
        }
        let read: Bridge = line.parse().map_err(|error| format!("bridge.bridges[{index}]: {}", field(error)))?;
        if bridge.use_bridges && read.transport() != transport {
            return Err(format!(
                "bridge.bridges[{index}]: it is reached by {}, but bridge.transport says {transport}",
                read.transport()
            ));
        }
        notes.extend(read.note().filter(|_| bridge.use_bridges));
        lines.push(Value::from(read.to_string()));
    }
    if lines.len() > MAX_BRIDGES {
        return Err(format!("bridge.bridges: more than {MAX_BRIDGES} entries"));
    }
    match (bridge.use_bridges, lines.is_empty()) {
        (true, true) => Err("bridge.bridges: use_bridges is true, and there is none".to_owned()),
        (true, false) => {
            torvm.insert("transport".to_owned(), Value::from(transport.as_str()));
            torvm.insert("bridges".to_owned(), Value::from(lines));
            Ok(())
        }
        (false, false) => {
            notes.push("bridge.bridges is not taken: use_bridges is false".to_owned());
            Ok(())
        }
        (false, true) => Ok(()),
    }
}

fn nodes(config: &Config, torvm: &mut Table) -> Result<(), String> {
    for (field, key, nodes) in [
        ("exit_nodes", "exit-nodes", &config.exit_nodes),
        ("entry_nodes", "entry-nodes", &config.entry_nodes),
        ("exclude_nodes", "exclude-nodes", &config.exclude_nodes),
    ] {
        if nodes.len() > MAX_NODES {
            return Err(format!("{field}: more than {MAX_NODES} entries"));
        }
        let read = |(index, node): (usize, &String)| match node.parse::<Node>() {
            Ok(node) => Ok(Value::from(node.to_string())),
            Err(error) => Err(format!("{field}[{index}]: {}", error.0)),
        };
        let nodes = nodes.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
        if !nodes.is_empty() {
            torvm.insert(key.to_owned(), Value::from(nodes));
        }
    }
    if config.strict_nodes {
        torvm.insert("strict-nodes".to_owned(), Value::from(true));
    }
    Ok(())
}

fn proxy(proxy: &ProxyConfig, name: &str, torvm: &mut Table, notes: &mut Vec<String>) -> Result<(), String> {
    let key = match proxy.r#type.as_str() {
        "" => return Ok(()),
        "https" => "https-proxy",
        "socks5" => "socks5-proxy",
        "http" => {
            return Err("proxy.type: Tor does not use an http proxy any more; write https for one that allows CONNECT"
                .to_owned());
        }
        other => return Err(format!("proxy.type: \"{}\" is not https or socks5", plain(other))),
    };
    // Not repeated: somebody may have written a password there.
    let wrong = || "proxy.address: it is not host:port".to_owned();
    let (host, port) = proxy.address.rsplit_once(':').ok_or_else(wrong)?;
    let named = host.parse::<HostName>().is_ok() || host.parse::<std::net::Ipv4Addr>().is_ok();
    let port =
        Some(port).filter(|port| port.bytes().all(|byte| byte.is_ascii_digit())).and_then(|port| port.parse().ok());
    let port = port.filter(|&port: &u16| named && port != 0).ok_or_else(wrong)?;
    torvm.insert(key.to_owned(), Value::from(format!("{host}:{port}")));
    match (proxy.username.is_empty(), proxy.password.is_empty()) {
        (true, true) => {}
        (true, false) => return Err("proxy.password: it needs proxy.username".to_owned()),
        (false, true) => return Err("proxy.username: Tor sends it only with proxy.password".to_owned()),
        (false, false) => {
            User::try_from(proxy.username.clone()).map_err(|error| format!("proxy.username: {}", error.0))?;
            let path = format!("/etc/proxyvpn/{name}.password");
            notes.push(format!(
                "proxy.password is not taken: no profile holds a password. Write it to {path} (owner root, group proxyvpn, mode 0640); \
                 only root can import a profile that names it"
            ));
            torvm.insert("proxy-username".to_owned(), Value::from(proxy.username.clone()));
            torvm.insert("proxy-password-file".to_owned(), Value::from(path));
        }
    }
    Ok(())
}

/// Foreign text in a message: short, and one line.
fn plain(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect::<String>().replace("\\\"", "\"")
}

#[cfg(test)]
#[path = "import_tests.rs"]
mod tests;
