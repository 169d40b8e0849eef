//! Looks up the upstream's name through given resolvers, over marked sockets: the C library's look-up cannot be marked, and
//! would be blocked or steered into the tunnel.
//!
//! Honoured are `/etc/hosts`, and `search`, `domain` and `ndots` of `/etc/resolv.conf`. nsswitch.conf, mDNS and LLMNR are not.

mod marked;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use futures_util::future::{Either, select};
use hickory_resolver::Resolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts, ServerOrderingStrategy,
};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};

use crate::config::check;
use crate::config::error::Rejected;
use crate::resolvers::{self, ResolvConf, join};
use marked::MarkedProvider;

/// Most addresses that are given back.
pub const MAX_ADDRESSES: usize = 16;
/// How long the other family may take after the first answered (RFC 8305 section 3 has 50 ms for a resolver nearby).
const OTHER_FAMILY: Duration = Duration::from_millis(300);
/// Longest time for one try at one server.
const MAX_TRY: Duration = Duration::from_secs(3);

/// Why a name has no address. `Display` is a sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// Not a name.
    #[error(transparent)]
    BadName(#[from] Rejected),
    /// Nobody to ask.
    #[error(
        "{host} cannot be looked up: no DNS server is known; name one with --dns, or give the address with --proxy-ip"
    )]
    NoResolver {
        /// Name.
        host: String,
    },
    /// NXDOMAIN.
    #[error("there is no host {host} (asked {resolvers}); check its spelling, or give its address with --proxy-ip")]
    NoSuchName {
        /// Name.
        host: String,
        /// Who was asked.
        resolvers: String,
    },
    /// The name has other records only.
    #[error("{host} has no address (asked {resolvers}); check its spelling, or give its address with --proxy-ip")]
    NoAddress {
        /// Name.
        host: String,
        /// Who was asked.
        resolvers: String,
    },
    /// No answer.
    #[error(
        "{host} cannot be looked up: no answer from the DNS server ({resolvers}) within {seconds} s; check the network, \
         name another server with --dns, or give the address with --proxy-ip"
    )]
    Silent {
        /// Name.
        host: String,
        /// Who was asked.
        resolvers: String,
        /// How long.
        seconds: u64,
    },
    /// An answer that says neither yes nor no.
    #[error("{host} cannot be looked up: the DNS server ({resolvers}) answered {answer}; name another one with --dns")]
    Refused {
        /// Name.
        host: String,
        /// Who was asked.
        resolvers: String,
        /// `Server Failure` and the like.
        answer: String,
    },
    /// The query could not be sent or the answer not be read.
    #[error("{host} cannot be looked up: the DNS server ({resolvers}) cannot be asked")]
    Unreachable {
        /// Name.
        host: String,
        /// Who was asked.
        resolvers: String,
        /// Why.
        source: io::Error,
    },
    /// No marked socket: CAP_NET_ADMIN is missing.
    #[error("cannot open a marked socket for DNS")]
    Socket(#[source] io::Error),
}

/// The addresses of `host`, IPv4 first, at most [`MAX_ADDRESSES`]. An address literal is its own answer.
///
/// Every socket has `mark` as its SO_MARK before it is bound or connected. The call ends after `timeout`.
///
/// # Errors
/// See [`LookupError`].
pub async fn resolve(
    host: &str,
    resolvers: &[IpAddr],
    mark: Option<u32>,
    timeout: Duration,
) -> Result<Vec<IpAddr>, LookupError> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let host = check::host(host)?.to_ascii_lowercase();
    let read = |path: &'static str| {
        // A panic in there is an empty file here.
        async move { tokio::task::spawn_blocking(move || resolvers::read(Path::new(path))).await.ok().flatten() }
    };
    let hosts = read("/etc/hosts").await.unwrap_or_default();
    let conf = resolvers::parse(&read("/etc/resolv.conf").await.unwrap_or_default());
    Lookup { resolvers, port: 53, mark, timeout, hosts: &hosts, conf: &conf }.run(&host).await
}

/// A look-up with all that it depends on.
struct Lookup<'a> {
    resolvers: &'a [IpAddr],
    port: u16,
    mark: Option<u32>,
    timeout: Duration,
    hosts: &'a str,
    conf: &'a ResolvConf,
}

impl Lookup<'_> {
    async fn run(&self, host: &str) -> Result<Vec<IpAddr>, LookupError> {
        let known = local(host, self.hosts);
        if !known.is_empty() {
            return Ok(known);
        }
        if self.resolvers.is_empty() {
            return Err(LookupError::NoResolver { host: host.to_owned() });
        }
        // Told apart here: the library would try ten times and call it something else.
        marked::probe(self.mark).map_err(LookupError::Socket)?;
        let provider = MarkedProvider::new(self.mark);
        let answer = tokio::time::timeout(self.timeout, self.ask(host, &provider)).await;
        let (host, resolvers) = (host.to_owned(), join(self.resolvers));
        Err(match answer.unwrap_or(Err(NetError::Timeout)) {
            Ok(addresses) if addresses.is_empty() => LookupError::NoAddress { host, resolvers },
            Ok(addresses) => return Ok(addresses),
            Err(error) if error.is_nx_domain() => LookupError::NoSuchName { host, resolvers },
            Err(NetError::Dns(DnsError::NoRecordsFound(no))) => match no.response_code {
                ResponseCode::NoError => LookupError::NoAddress { host, resolvers },
                code => LookupError::Refused { host, resolvers, answer: code.to_string() },
            },
            Err(NetError::Dns(DnsError::ResponseCode(code))) => {
                LookupError::Refused { host, resolvers, answer: code.to_string() }
            }
            Err(error) if is_silence(&error) => {
                LookupError::Silent { host, resolvers, seconds: self.timeout.as_secs().max(1) }
            }
            Err(error) => {
                let source = provider.fault().unwrap_or_else(|| io::Error::other(error));
                LookupError::Unreachable { host, resolvers, source }
            }
        })
    }

    /// Goes through the search list. Each name is asked for both families before the next one: addresses of two names
    /// must not be mixed.
    async fn ask(&self, host: &str, provider: &MarkedProvider) -> Result<Vec<IpAddr>, NetError> {
        let resolver = self.resolver(provider.clone())?;
        // "No address" tells more than "no such name" of a name with a search domain behind it.
        let mut no = None;
        for name in candidates(host, self.conf) {
            match self.both(&resolver, &name).await {
                Ok(addresses) if addresses.is_empty() => no = Some(Ok(addresses)),
                Err(error) if error.is_nx_domain() => no = no.or(Some(Err(error))),
                Err(error) if error.is_no_records_found() => no = Some(Err(error)),
                other => return other,
            }
        }
        no.unwrap_or(Ok(Vec::new()))
    }

    async fn both(&self, resolver: &Resolver<MarkedProvider>, name: &str) -> Result<Vec<IpAddr>, NetError> {
        let name = Name::from_ascii(name)?;
        let family = |kind| {
            let name = name.clone();
            Box::pin(async move {
                let answer = resolver.lookup(name, kind).await?;
                Ok::<Vec<IpAddr>, NetError>(answer.answers().iter().filter_map(|r| r.data.ip_addr()).collect())
            })
        };
        let found = match select(family(RecordType::A), family(RecordType::AAAA)).await {
            Either::Left((one, other)) | Either::Right((one, other)) => match one {
                Ok(mut addresses) if !addresses.is_empty() => {
                    // Some servers never answer AAAA; that must not cost the addresses that are there.
                    if let Ok(Ok(more)) = tokio::time::timeout(OTHER_FAMILY, other).await {
                        addresses.extend(more);
                    }
                    Ok(addresses)
                }
                Ok(_) => other.await,
                Err(error) => match other.await {
                    Ok(addresses) if !addresses.is_empty() => Ok(addresses),
                    // "No such name" is true for both; "no such record" only says something about one.
                    Err(second) if second.is_nx_domain() || !second.is_no_records_found() && !error.is_nx_domain() => {
                        Err(second)
                    }
                    _ => Err(error),
                },
            },
        };
        let mut addresses = found?;
        addresses.sort_by_key(IpAddr::is_ipv6);
        addresses.dedup();
        addresses.truncate(MAX_ADDRESSES);
        Ok(addresses)
    }

    fn resolver(&self, provider: MarkedProvider) -> Result<Resolver<MarkedProvider>, NetError> {
        let connection = |mut config: ConnectionConfig| {
            config.port = self.port;
            config
        };
        let servers = self.resolvers.iter().map(|&ip| {
            let connections = vec![connection(ConnectionConfig::udp()), connection(ConnectionConfig::tcp())];
            NameServerConfig::new(ip, true, connections)
        });
        let config = ResolverConfig::from_name_servers(servers.collect());
        let mut builder = Resolver::builder_with_config(config, provider);
        let ResolverOpts { timeout, attempts, use_hosts_file, server_ordering_strategy, .. } = builder.options_mut();
        *timeout = (self.timeout / 4).min(MAX_TRY);
        *attempts = 2;
        *use_hosts_file = ResolveHosts::Never;
        *server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        builder.build()
    }
}

fn is_silence(error: &NetError) -> bool {
    match error {
        NetError::Timeout => true,
        NetError::Io(error) => error.kind() == io::ErrorKind::TimedOut,
        _ => false,
    }
}

/// What is known without asking: `localhost` (RFC 6761 section 6.3) and hosts(5).
fn local(host: &str, hosts: &str) -> Vec<IpAddr> {
    let host = host.trim_end_matches('.');
    let mut found: Vec<IpAddr> = hosts
        .lines()
        .filter_map(|line| {
            let mut words = line.split('#').next()?.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|name| name.trim_end_matches('.').eq_ignore_ascii_case(host)).then_some(address)
        })
        .take(MAX_ADDRESSES)
        .collect();
    if found.is_empty() && (host == "localhost" || host.ends_with(".localhost")) {
        found = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    }
    found.sort_by_key(IpAddr::is_ipv6);
    found.dedup();
    found
}

/// The full names to ask for, in order (resolv.conf(5), `search` and `ndots`).
fn candidates(host: &str, conf: &ResolvConf) -> Vec<String> {
    if host.ends_with('.') {
        return vec![host.to_owned()];
    }
    let plain = format!("{host}.");
    let searched = conf.search.iter().map(|domain| format!("{host}.{domain}.")).filter(|name| name.len() <= 254);
    if host.matches('.').count() >= conf.ndots {
        std::iter::once(plain).chain(searched).collect()
    } else {
        searched.chain(std::iter::once(plain)).collect()
    }
}

#[cfg(test)]
mod tests;
