//! The checks of the diagnosis: what a connection needs, each with a result and, where it is not there, one line of remedy.
//!
//! - `torvm`: what a virtual machine with Tor needs

mod torvm;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use proxyvpn_dbus::types::Check;
use proxyvpn_engine::upstream::{ConnectError, Connector, Target};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::carrier::Paths;
use super::{network, upstream};
use crate::config::profile::{Backend, Scheme};
use crate::fdstore::FdStore;
use crate::lookup;
use crate::machine::Request;
use crate::machine::failure::chain;
use crate::net::desired::{Desired, MARK};
use crate::net::{self, Keeping, Network};
use crate::resolvers::{self, Resolvers};
use crate::systemd;

/// A name that exists for documentation (RFC 2606) and resolves in the public DNS.
const KNOWN_NAME: &str = "example.com";
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Report(Vec<Check>);

impl Report {
    fn add(&mut self, code: &str, outcome: &str, text: impl Into<String>, remedy: impl Into<String>) {
        let (code, outcome) = (code.to_owned(), outcome.to_owned());
        self.0.push(Check { code, outcome, text: text.into(), remedy: remedy.into() });
    }

    fn ok(&mut self, code: &str, text: impl Into<String>) {
        self.add(code, "ok", text, "");
    }

    fn failed(&mut self, code: &str, text: impl Into<String>, remedy: impl Into<String>) {
        self.add(code, "failed", text, remedy);
    }

    fn skipped(&mut self, codes: &[&str], why: &str) {
        for code in codes {
            self.add(code, "skipped", why, "");
        }
    }
}

/// Runs all checks; those of an upstream only with a request. Changes nothing; asks the resolvers and the upstream.
pub(super) async fn run(paths: &Paths, request: Option<&Request>) -> Vec<Check> {
    let mut report = Report::default();
    let (desired, found) = match request.map(|request| network::desired(&request.profile)) {
        Some(found) => found,
        None => (network::closed(), resolvers::find(&[], &resolvers::Paths::default())),
    };
    let own = machine(&mut report, &paths.state, &desired).await;
    if let Some(request) = request.filter(|request| request.profile.backend == Backend::TorVm) {
        torvm::checks(&mut report, paths).await;
        // Nobody else is asked: that could be seen, and tells that somebody is about to use Tor.
        if request.profile.upstream.scheme != Scheme::Direct {
            answers(&mut report, request, &found, &own).await;
        }
        return report.0;
    }
    let known = resolver(&mut report, &found).await;
    if let Some(request) = request {
        proxy(&mut report, request, &found, &own, known).await;
    }
    report.0
}

/// What the machine must have: capability, TUN, a free name, a firewall. Returns the machine's addresses.
async fn machine(report: &mut Report, state_dir: &Path, desired: &Desired) -> Vec<IpAddr> {
    const CODES: [&str; 4] = ["capability", "tun", "device-name", "firewall"];
    let (error, network) = match Network::open(state_dir, Keeping::default()).await {
        Ok(network) => (network.preflight(desired).await.err(), Some(network)),
        Err(error) => (Some(error), None),
    };
    let broken = error.as_ref().map(|error| match error {
        net::Error::Privilege | net::Error::Firewall(net::firewall::Error::Privilege) => CODES[0],
        net::Error::TunUnavailable(_) => CODES[1],
        net::Error::NameTaken(_) => CODES[2],
        _ => CODES[3],
    });
    let mut reached = false;
    for code in CODES {
        if reached {
            report.skipped(&[code], "not checked, because of the failure before");
        } else if broken == Some(code) {
            reached = true;
            let text = error.as_ref().map(|error| chain(error)).unwrap_or_default();
            report.failed(code, text, remedy(code));
        } else {
            report.ok(code, found(code, network.as_ref()));
        }
    }
    if let Some(network) = &network {
        owner(report, network).await;
        ends_connections(report, network);
    }
    match &network {
        Some(network) => network.own_addresses().await.unwrap_or_default(),
        None => Vec::new(),
    }
}

/// Can others remove the firewall while a connection is wanted?
async fn owner(report: &mut Report, network: &Network) {
    const CODE: &str = "firewall-owner";
    let remedy = "run the daemon by systemd with FileDescriptorStoreMax=16, as its unit does";
    if network.firewall_name() != "nftnl" {
        report.skipped(&[CODE], "the firewall is not applied through nftnl");
    } else if systemd::keeps_descriptors().await && FdStore::from_env().is_some() {
        report.ok(CODE, "The firewall's table stays with its socket, which the service manager keeps");
    } else {
        let text =
            "Nobody keeps the firewall's socket, so other programs can remove the rules; the daemon puts them back";
        report.add(CODE, "warning", text, remedy);
    }
}

/// Does the kernel end connections from before at once? If not, programs that only wait notice it late.
fn ends_connections(report: &mut Report, network: &Network) {
    const CODE: &str = "old-connections";
    let text = match network.ends_connections() {
        Ok(true) => {
            return report.ok(CODE, "Connections from before are ended at once, so that programs connect again");
        }
        Ok(false) => "This kernel does not end connections (CONFIG_INET_DIAG_DESTROY); those from before are cut when \
                      their programs send next"
            .to_owned(),
        Err(error) => format!("The kernel's table of connections cannot be asked (tcp_diag): {error}"),
    };
    report.add(CODE, "warning", text, "after connecting, start programs anew that wait for an answer");
}

fn found(code: &str, network: Option<&Network>) -> String {
    match code {
        "capability" => "The daemon may change the network (CAP_NET_ADMIN)".to_owned(),
        "tun" => "/dev/net/tun can be opened".to_owned(),
        "device-name" => "The tunnel's device name is free".to_owned(),
        _ => format!("The firewall is applied through {}", network.map_or("nothing", Network::firewall_name)),
    }
}

fn remedy(code: &str) -> &'static str {
    match code {
        "capability" => "start the daemon through its unit: systemctl start proxyvpnd",
        "tun" => "load the module: modprobe tun; the unit must allow /dev/net/tun",
        "device-name" => "set another name: [tun] name in the profile, or --tun-name",
        _ => {
            "load the kernel module nf_tables, or install the nft program; iptables will do only with iptables-fallback = true in \
             [protect] of the profile"
        }
    }
}

/// Is there a resolver, and does it answer over UDP? Returns an address of [`KNOWN_NAME`].
async fn resolver(report: &mut Report, resolvers: &Resolvers) -> Option<IpAddr> {
    let asked = resolvers.for_lookup();
    if asked.is_empty() {
        let warning = resolvers.warning.as_ref().map(ToString::to_string).unwrap_or_default();
        report.failed(
            "resolver",
            format!("No resolver is known. {warning}"),
            "name one: [dns] servers in the profile, or --dns",
        );
        report.skipped(&["dns-udp"], "there is no resolver to ask");
        return None;
    }
    report.ok("resolver", format!("Resolvers: {}", network::texts(asked).join(", ")));
    match lookup::resolve(KNOWN_NAME, asked, Some(MARK), TIMEOUT).await {
        Ok(addresses) => {
            report.ok("dns-udp", format!("{KNOWN_NAME} was looked up over UDP"));
            addresses.into_iter().find(IpAddr::is_ipv4)
        }
        Err(error) => {
            report.failed(
                "dns-udp",
                chain(&error),
                "check the resolver, or name another: [dns] servers in the profile, or --dns",
            );
            None
        }
    }
}

/// Is the proxy there, and what does it let through?
async fn proxy(report: &mut Report, request: &Request, resolvers: &Resolvers, own: &[IpAddr], known: Option<IpAddr>) {
    const AFTER: [&str; 3] = ["proxy-name", "proxy-ip-literal", "dns-tcp-proxy"];
    let Some(connector) = answers(report, request, resolvers, own).await else {
        report.skipped(&AFTER, "the proxy cannot be asked");
        return;
    };
    let by_name = connector.connect(&Target::Name(KNOWN_NAME.to_owned(), 443)).await;
    match &by_name {
        Ok(_) => report.ok("proxy-name", format!("The proxy connects to {KNOWN_NAME}:443")),
        Err(error) => report.add(
            "proxy-name",
            "warning",
            chain(error),
            "ask who runs the proxy whether CONNECT to port 443 is allowed",
        ),
    }
    literal(report, &connector, known, by_name.is_ok()).await;
    dns_over_proxy(report, &connector, &resolvers.addresses).await;
}

/// Is the proxy there?
async fn answers(report: &mut Report, request: &Request, resolvers: &Resolvers, own: &[IpAddr]) -> Option<Connector> {
    let connector = match upstream::connector(request, resolvers.for_lookup(), own).await {
        Ok(connector) => Connector { timeout: TIMEOUT, ..connector },
        Err(failure) => {
            report.failed("proxy", failure.text, "mend the profile's [upstream]");
            return None;
        }
    };
    if let Err(error) = connector.probe().await {
        report.failed("proxy", upstream::failure(&error).text, "check address, port, user and password of the proxy");
        return None;
    }
    report.ok("proxy", format!("{} answers", request.profile.upstream));
    Some(connector)
}

/// Programs look names up themselves, so the proxy sees addresses. Some proxies refuse those.
async fn literal(report: &mut Report, connector: &Connector, known: Option<IpAddr>, name_works: bool) {
    let Some(address) = known else {
        report.skipped(&["proxy-ip-literal"], "no address is known to try with");
        return;
    };
    match connector.connect(&Target::Address(SocketAddr::new(address, 443))).await {
        Ok(_) => report.ok("proxy-ip-literal", "The proxy accepts addresses instead of names"),
        Err(error @ ConnectError::Refused { .. }) if name_works => report.failed(
            "proxy-ip-literal",
            format!("The proxy refuses addresses and wants names: {}", chain(&error)),
            "ask who runs the proxy to allow CONNECT to addresses",
        ),
        Err(error) => report.add("proxy-ip-literal", "warning", chain(&error), "see the check before"),
    }
}

/// DNS over TCP through the proxy: what is left where UDP is closed.
async fn dns_over_proxy(report: &mut Report, connector: &Connector, resolvers: &[IpAddr]) {
    const CODE: &str = "dns-tcp-proxy";
    let Some(resolver) = resolvers.first() else {
        report.skipped(&[CODE], "there is no resolver to ask");
        return;
    };
    match connector.connect(&Target::Address(SocketAddr::new(*resolver, 53))).await {
        Err(error) => report.add(CODE, "warning", chain(&error), "not needed while DNS over UDP works"),
        Ok(mut tunnel) => match timeout(TIMEOUT, ask(&mut tunnel.stream, &tunnel.early)).await {
            Ok(Ok(())) => report.ok(CODE, format!("{resolver} answers DNS over TCP through the proxy")),
            Ok(Err(error)) => report.add(CODE, "warning", error.to_string(), "not needed while DNS over UDP works"),
            Err(_) => {
                report.add(CODE, "warning", format!("{resolver} is silent"), "not needed while DNS over UDP works")
            }
        },
    }
}

/// One question for the root's name servers over TCP (RFC 1035 section 4.2.2), answered with the same id.
async fn ask(stream: &mut tokio::net::TcpStream, early: &[u8]) -> std::io::Result<()> {
    const ID: [u8; 2] = [0x70, 0x76];
    let question = [0, 17, ID[0], ID[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];
    stream.write_all(&question).await?;
    let mut answer = [0; 4];
    early.chain(stream).read_exact(&mut answer).await?;
    if answer[2..] == ID { Ok(()) } else { Err(std::io::Error::other("what answers is not a DNS server")) }
}
