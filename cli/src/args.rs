//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

use crate::exit::Exit;
use crate::secret::Secret;

/// Puts this machine behind an upstream proxy, through proxyvpnd
#[derive(Debug, Parser)]
#[command(name = "proxyctl", version, about, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Connect, and wait until it is done
    #[command(visible_alias = "up")]
    Connect(Box<Connect>),
    /// Disconnect, and wait until the network is as it was
    #[command(visible_alias = "down")]
    Disconnect(Wait),
    /// Make the present connection anew, without opening the network
    Reconnect(Wait),
    /// Show the state of the connection
    Status(Status),
    /// List, show, import and remove profiles
    #[command(subcommand, visible_alias = "profiles")]
    Profile(Profile),
    /// Show every change that connect would make
    Plan(Box<Plan>),
    /// Show the daemon's log
    Logs(Logs),
    /// List the connections in the tunnel
    Flows(Json),
    /// Check what a connection needs
    Doctor(Box<Plan>),
    /// No network unless connected, also after a reboot
    Lockdown(Lockdown),
    /// Tor: new identity, circuits, bridges, log
    #[command(subcommand, name = "torvm")]
    TorVm(TorVm),
    /// Give the network back without daemon and bus (as root)
    Rescue,
    /// Print a completion script
    Completions {
        /// For which shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// Shells with a completion script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// `--json`.
#[derive(Debug, Default, Args)]
pub(crate) struct Json {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How long to wait.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Give up waiting after this time; the daemon goes on [default: 60 without progress, 180 while Tor finds its way]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: Option<u64>,
    /// Return as soon as the daemon has accepted it
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// Risks that connect asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Risk {
    /// The SSH session that proxyctl runs in is cut
    LoseSsh,
}

/// `connect`.
#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Name of the profile; without one and without settings, the only profile there is
    pub(crate) profile: Option<String>,
    /// Settings.
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// Waiting.
    #[command(flatten)]
    pub(crate) wait: Wait,
    /// Show every change that would be made, and make none
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON (with --dry-run)
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,
    /// Do not ask about a risk
    #[arg(long, value_enum, value_name = "RISK", value_delimiter = ',')]
    pub(crate) accept_risk: Vec<Risk>,
    /// Store the daemon's log of this connection attempt in the state directory
    #[arg(long)]
    pub(crate) keep_logs: bool,
    /// Where --keep-logs stores it [default: $XDG_RUNTIME_DIR/proxyvpn]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) state_dir: Option<PathBuf>,
}

/// `plan` and `doctor`.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// Name of the profile
    pub(crate) profile: Option<String>,
    /// Settings.
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// JSON.
    #[command(flatten)]
    pub(crate) output: Json,
}

/// Settings of a connection. With any of them the connection is ad-hoc, or overrides the named profile.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Settings (each overrides the profile; without a profile the connection is ad-hoc)")]
pub(crate) struct Settings {
    /// The proxy: http://[USER@]HOST:PORT
    #[arg(long, value_name = "URL", conflicts_with_all = ["proxy_host", "proxy_port"])]
    pub(crate) proxy_url: Option<String>,
    /// Host name or address of the proxy
    #[arg(long, value_name = "HOST", requires = "proxy_port")]
    pub(crate) proxy_host: Option<String>,
    /// TCP port of the proxy
    #[arg(long, value_name = "PORT", requires = "proxy_host", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) proxy_port: Option<u16>,
    /// User name for the proxy
    #[arg(long, value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Password for the proxy; "-" reads it from standard input, or asks on a terminal
    #[arg(long, value_name = "PASSWORD|-", conflicts_with = "password_file", allow_hyphen_values = true)]
    pub(crate) password: Option<Secret>,
    /// File with the password for the proxy
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// Address of the proxy, which saves its look-up (more than one: with commas or repeated)
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    pub(crate) proxy_ip: Vec<IpAddr>,
    /// Name of the TUN device
    #[arg(long, value_name = "NAME", value_parser = device_name)]
    pub(crate) tun_name: Option<String>,
    /// Address and prefix length of the TUN device; once for IPv4, once for IPv6
    #[arg(long, value_name = "ADDRESS/LENGTH", value_parser = cidr)]
    pub(crate) tun_cidr: Vec<Cidr>,
    /// MTU of the TUN device, 1280 to 65535
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=65_535))]
    pub(crate) mtu: Option<u32>,
    /// Resolver that may be asked around the tunnel (more than one: with commas or repeated)
    #[arg(long, visible_alias = "allow-dns", value_name = "ADDRESS", value_delimiter = ',')]
    pub(crate) dns: Vec<IpAddr>,
    /// Do not block what does not go through the tunnel
    #[arg(long)]
    pub(crate) no_killswitch: bool,
    /// Network that goes around the tunnel (more than one: with commas or repeated)
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_delimiter = ',', value_parser = prefix)]
    pub(crate) lan: Vec<String>,
    /// Local user whose traffic goes around the tunnel (more than one: with commas or repeated)
    #[arg(long, value_name = "USER", value_delimiter = ',')]
    pub(crate) bypass_user: Vec<String>,
    /// Let the daemon log this connection in detail
    #[arg(long)]
    pub(crate) verbose: bool,
}

/// `status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Go on and show every change
    #[arg(long, conflicts_with = "check")]
    pub(crate) watch: bool,
    /// Tell by the exit code: 0 connected, 3 not connected, 6 blocked
    #[arg(long)]
    pub(crate) check: bool,
    /// JSON.
    #[command(flatten)]
    pub(crate) output: Json,
}

/// `profile`.
#[derive(Debug, Subcommand)]
pub(crate) enum Profile {
    /// List the profiles
    List(Json),
    /// Show a profile
    Show {
        /// Name of the profile
        name: String,
        /// JSON.
        #[command(flatten)]
        output: Json,
    },
    /// Store a TOML file, or one of TorVM's JSON, as a profile
    Import {
        /// The file; "-" is standard input
        file: PathBuf,
        /// Name of the profile [default: the file's name without .toml or .json]
        #[arg(long)]
        name: Option<String>,
        /// Replace an imported profile of that name
        #[arg(long)]
        replace: bool,
    },
    /// Remove imported profiles
    Remove {
        /// Names of the profiles
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// `torvm`.
#[derive(Debug, Subcommand)]
pub(crate) enum TorVm {
    /// Let new connections take other ways through the Tor network
    NewIdentity,
    /// List the ways through the Tor network
    Circuits(Json),
    /// Set and list bridges
    #[command(subcommand)]
    Bridges(Bridges),
    /// Show Tor's log
    Log(Logs),
}

/// `torvm bridges`.
#[derive(Debug, Subcommand)]
pub(crate) enum Bridges {
    /// Set the bridges of an imported profile
    Set {
        /// Name of the profile
        profile: String,
        /// Bridges, as bridges.torproject.org gives them; "-" reads them from standard input, one a line
        lines: Vec<String>,
        /// How they are reached: none, obfs4, meek or snowflake; none without bridges removes them [default: as the first one says]
        #[arg(long, value_name = "TRANSPORT")]
        transport: Option<String>,
    },
    /// List the bridges of one or all profiles
    List {
        /// Name of the profile
        profile: Option<String>,
        /// JSON.
        #[command(flatten)]
        output: Json,
    },
}

/// `logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on and show new records
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// How many of the newest records [default: all; with --follow: 10]
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) lines: Option<u32>,
    /// JSON.
    #[command(flatten)]
    pub(crate) output: Json,
}

/// `lockdown`.
#[derive(Debug, Args)]
pub(crate) struct Lockdown {
    /// Turn it on or off, or show it
    #[arg(value_enum, default_value_t = Switch::Status)]
    pub(crate) what: Switch,
    /// JSON.
    #[command(flatten)]
    pub(crate) output: Json,
}

/// What `lockdown` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// No network unless connected
    On,
    /// The network is open while disconnected
    Off,
    /// Show it
    Status,
}

/// Address and prefix length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cidr {
    /// IPv4.
    V4(String),
    /// IPv6.
    V6(String),
}

fn split_prefix(text: &str) -> Result<(IpAddr, Option<u8>), String> {
    let (address, length) = text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
    let address: IpAddr = address.parse().map_err(|_| "not an IP address".to_owned())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = length
        .map(|length| length.parse().ok().filter(|&length| length <= most))
        .map(|length| length.ok_or_else(|| format!("the prefix length is 0 to {most}")))
        .transpose()?;
    Ok((address, length))
}

fn prefix(text: &str) -> Result<String, String> {
    split_prefix(text).map(|_| text.to_owned())
}

fn cidr(text: &str) -> Result<Cidr, String> {
    match split_prefix(text)? {
        (_, None) => Err("the prefix length is missing (ADDRESS/LENGTH)".to_owned()),
        (IpAddr::V4(_), _) => Ok(Cidr::V4(text.to_owned())),
        (IpAddr::V6(_), _) => Ok(Cidr::V6(text.to_owned())),
    }
}

/// As `dev_valid_name` of the kernel: 1 to 15 bytes, no `/`, `:` or white space.
fn device_name(text: &str) -> Result<String, String> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        return Err("a device name has 1 to 15 bytes without '/', ':' and white space".to_owned());
    }
    Ok(text.to_owned())
}

/// The command with all its help.
pub(crate) fn command() -> clap::Command {
    Cli::command().after_help(Exit::help())
}

/// Reads the command line; ends the process with 2 when it is wrong, with 0 for `--help` and `--version`.
pub(crate) fn parse() -> Cli {
    let matches = command().get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn what_must_parse() {
        for good in [
            "proxyctl connect",
            "proxyctl up office --timeout 5 --no-wait --keep-logs --state-dir /tmp/x",
            "proxyctl connect --proxy-url http://u@h:1 --username u --password - --proxy-ip 10.0.0.1,10.0.0.2 --tun-name t0 \
             --tun-cidr 10.1.1.1/30 --tun-cidr fd00::1/64 --mtu 1500 --dns 1.1.1.1 --allow-dns ::1 --no-killswitch \
             --lan 10.0.0.0/8 --bypass-user squid --verbose --dry-run --json --accept-risk=lose-ssh",
            "proxyctl connect --proxy-host h --proxy-port 8080 --password-file /x",
            "proxyctl connect --password -secret-",
            "proxyctl down --timeout 5",
            "proxyctl reconnect --no-wait",
            "proxyctl status --check --json",
            "proxyctl status --watch",
            "proxyctl profile list --json",
            "proxyctl profile show x",
            "proxyctl profile import - --name x --replace",
            "proxyctl profile remove x y",
            "proxyctl plan office --json",
            "proxyctl plan --proxy-url http://h:1",
            "proxyctl logs -f -n 3 --json",
            "proxyctl flows --json",
            "proxyctl doctor office --json",
            "proxyctl lockdown",
            "proxyctl lockdown on",
            "proxyctl lockdown status --json",
            "proxyctl torvm new-identity",
            "proxyctl torvm circuits --json",
            "proxyctl torvm bridges set tor 192.0.2.1:443 192.0.2.2:443",
            "proxyctl torvm bridges set tor --transport none",
            "proxyctl torvm bridges list tor --json",
            "proxyctl torvm log -f -n 3 --json",
            "proxyctl rescue",
            "proxyctl completions fish",
        ] {
            assert!(parse(good).is_ok(), "{good}: {}", parse(good).unwrap_err());
        }
    }

    #[test]
    fn what_must_not_parse() {
        for bad in [
            "proxyctl",
            "proxyctl fly",
            "proxyctl connect a b",
            "proxyctl connect --proxy-host h",
            "proxyctl connect --proxy-port 1",
            "proxyctl connect --proxy-host h --proxy-port 0",
            "proxyctl connect --proxy-url http://h:1 --proxy-host h --proxy-port 1",
            "proxyctl connect --password x --password-file y",
            "proxyctl connect --proxy-ip proxy",
            "proxyctl connect --tun-name a/b",
            "proxyctl connect --tun-name aaaaaaaaaaaaaaaa",
            "proxyctl connect --tun-cidr 10.0.0.1",
            "proxyctl connect --tun-cidr 10.0.0.1/33",
            "proxyctl connect --mtu 1279",
            "proxyctl connect --mtu 65536",
            "proxyctl connect --dns resolver",
            "proxyctl connect --lan everything",
            "proxyctl connect --timeout 0",
            "proxyctl connect --json",
            "proxyctl connect --accept-risk=all",
            "proxyctl status --watch --check",
            "proxyctl profile remove",
            "proxyctl logs -n 0",
            "proxyctl lockdown maybe",
            "proxyctl torvm",
            "proxyctl torvm bridges set",
            "proxyctl completions tcsh",
        ] {
            assert_eq!(parse(bad).map(|_| ()).map_err(|error| error.exit_code()), Err(2), "{bad}");
        }
    }

    #[test]
    fn resolvers_of_both_names_add_up() {
        let Command::Connect(connect) = parse("proxyctl up --dns 1.1.1.1 --allow-dns 9.9.9.9").unwrap().command else {
            panic!("not connect")
        };
        assert_eq!(connect.settings.dns.len(), 2);
    }

    #[test]
    fn a_password_cannot_be_printed() {
        let cli = parse("proxyctl connect --password hunter2").unwrap();
        assert!(!format!("{cli:?}").contains("hunter2"));
    }
}
