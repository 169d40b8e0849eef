//! The way rules reach the kernel.

use std::{
    borrow::Cow,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use super::{
    compile::compile,
    error::Error,
    iptables::{self, Programs},
    netlink::Netlink,
    nft,
    program::find,
    rules::Ruleset,
};
use crate::net::{
    Keeping,
    desired::{Desired, Exceptions, Forward, Locked, Tunnel},
    devices::Devices,
};

/// The way rules reach the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// libnftnl over netlink: `CAP_NET_ADMIN` is enough.
    Nftnl(Abilities, Option<Owner>),
    /// The program `nft`, at this path; as root only.
    Nft(PathBuf, Abilities),
    /// The iptables programs; as root only.
    Iptables(Programs),
}

/// What a kernel has of what the rules can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Connections can get a timeout of our own in connection tracking (`CONFIG_NF_CONNTRACK_TIMEOUT`).
    pub timeouts: bool,
    /// Frames can be stopped at the exit of a device (`CONFIG_NETFILTER_EGRESS`, Linux 5.16).
    pub egress: bool,
}

impl Abilities {
    /// Both.
    pub const ALL: Self = Self { timeouts: true, egress: true };
    /// Neither.
    pub const NONE: Self = Self { timeouts: false, egress: false };
}

/// The socket that the table belongs to (nft's flag `owner`, Linux 5.12): nobody else can change the table, a flush of all
/// rules passes over it, and it lives as long as the socket.
#[derive(Debug, Clone)]
pub struct Owner(Arc<Mutex<Netlink>>);

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Owner {}

impl Owner {
    /// The socket of an earlier process, or a new one that outlives this process. `None`: there is no place for it.
    fn new(keeping: Keeping) -> Result<Option<Self>, Error> {
        let adopted = keeping.firewall.and_then(|fd| {
            let adopted = Netlink::adopt(fd);
            adopted
                .inspect_err(|error| tracing::warn!(error = chain(error), "the firewall's socket is not taken over"))
                .ok()
        });
        let netlink = match (adopted, keeping.store) {
            (Some(netlink), _) => netlink,
            (None, None) => return Ok(None),
            (None, Some(store)) => {
                let mut netlink = Netlink::open_owner()?;
                settle(|ruleset| netlink.probe(ruleset))?;
                // Before there is a table: one whose socket is not kept would go with the process.
                store.keep(Keeping::FIREWALL, netlink.fd()).map_err(Error::Socket)?;
                netlink
            }
        };
        Ok(Some(Self(Arc::new(Mutex::new(netlink)))))
    }
}

/// Does something with the owner's socket, or with one for this alone.
fn with<T>(owner: Option<&Owner>, work: impl FnOnce(&mut Netlink) -> Result<T, Error>) -> Result<T, Error> {
    match owner {
        // What a panic left half-done, the next request replaces as a whole.
        Some(Owner(netlink)) => work(&mut netlink.lock().unwrap_or_else(PoisonError::into_inner)),
        None => work(&mut Netlink::open()?),
    }
}

/// What a kernel without [`Abilities::timeouts`] does.
const FULL: &str = "ended connections stay in connection tracking for 120 s: some 1,100 new ones per second fill its table, \
                    and the kernel drops packets (net.netfilter.nf_conntrack_max)";
/// What a kernel without [`Abilities::egress`] does.
const FRAMES: &str = "frames that bypass the IP layer are not stopped: of packet sockets, of virtual machines that are bridged \
                      with an uplink, of macvlan devices";

/// A ruleset with every kind of rule, to ask for before anything is changed.
static SAMPLE: LazyLock<Ruleset> = LazyLock::new(|| {
    let v4 = ipnet::Ipv4Net::new_assert([10, 255, 255, 1].into(), 30);
    let v6 = ipnet::Ipv6Net::new_assert([0xfd70, 0x7670, 0x6e, 0, 0, 0, 0, 1].into(), 64);
    let tunnel = Tunnel { name: "pvpn0".to_owned(), v4, v6: Some(v6), mtu: 1500, gateway: None };
    let (lan, resolvers) = (vec![v4.into(), v6.into()], vec![v4.addr().into()]);
    let exceptions = Exceptions { lan, resolvers, users: vec![0], services: vec![] };
    let desired = Desired {
        tunnel: Some(tunnel),
        guarded: vec![v4.addr().into(), v6.addr().into()],
        exceptions,
        locked: Locked::Yes,
        forward: Forward::Tunnel,
        ..Desired::closed()
    };
    let devices =
        Devices { uplinks: vec!["lo".to_owned()], inner: vec!["docker0".to_owned()], routed: vec!["pvpn1".to_owned()] };
    compile(&desired, &[], &devices)
});

impl Backend {
    /// Chooses the first that works and leaves nothing: libnftnl, then, as root, `nft`, then iptables.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with what was tried and what to do.
    pub fn choose() -> Result<Self, Error> {
        let mut tried = vec![];
        match Netlink::open().and_then(|mut netlink| settle(|ruleset| netlink.probe(ruleset))) {
            Ok(abilities) => return Ok(Self::Nftnl(abilities, None)),
            Err(error) => tried.push(format!("nftnl: {}", chain(&error))),
        }
        if !rustix::process::geteuid().is_root() {
            let advice = "Start proxyvpnd with its systemd unit, which gives it CAP_NET_ADMIN, or as root";
            return Err(Error::Unavailable { tried: tried.join("; "), advice });
        }
        match find("nft") {
            Some(path) => match settle(|ruleset| nft::probe(&path, ruleset)) {
                Ok(abilities) => return Ok(Self::Nft(path, abilities)),
                Err(error) => tried.push(format!("nft: {}", chain(&error))),
            },
            None => tried.push("nft: the program is not installed".to_owned()),
        }
        match Programs::find() {
            Some(programs) => match programs.probe(&SAMPLE) {
                Ok(()) => return Ok(Self::Iptables(programs)),
                Err(error) => tried.push(format!("iptables: {}", chain(&error))),
            },
            None => tried.push("iptables: the programs are not installed".to_owned()),
        }
        let advice = "Use a kernel with nf_tables (CONFIG_NF_TABLES_INET) and load its modules, or install iptables";
        Err(Error::Unavailable { tried: tried.join("; "), advice })
    }

    /// The same, whose table belongs to a socket that outlives this process, where the kernel and somebody who keeps the
    /// socket allow it.
    #[must_use]
    pub fn owned(self, keeping: Keeping) -> Self {
        let Self::Nftnl(abilities, None) = self else { return self };
        let owner = Owner::new(keeping).unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "the firewall's table gets no owner: other programs can remove it");
            None
        });
        Self::Nftnl(abilities, owner)
    }

    /// The name for status and logs: `nftnl`, `nft` or `iptables`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nftnl(..) => "nftnl",
            Self::Nft(..) => "nft",
            Self::Iptables(_) => "iptables",
        }
    }

    /// Whether what is wanted may be applied this way: iptables promises less, so it is used only where that is allowed.
    ///
    /// # Errors
    /// [`Error::FallbackNotAllowed`].
    pub fn permitted(&self, desired: &Desired) -> Result<(), Error> {
        match self {
            Self::Iptables(_) if !desired.iptables_fallback => {
                Err(Error::FallbackNotAllowed { lost: self.weaknesses().join("; ") })
            }
            _ => Ok(()),
        }
    }

    /// What this backend can't promise, one sentence each.
    ///
    pub fn weaknesses(&self) -> Vec<&'static str> {
        const FLUSH: &str = "another administrator's program can flush or replace the rules";
        let mut weaknesses = match self {
            Self::Nftnl(_, Some(_)) => vec![],
            Self::Nftnl(_, None) => vec![FLUSH],
            Self::Nft(..) => vec![FLUSH, "only root can use the nft program, so the daemon can't drop its privileges"],
            Self::Iptables(_) => vec![
                "another administrator's program can flush the rules, or put its own in front of them",
                "a change is atomic per table only: IPv4 is switched before IPv6, and marks before filters",
                "rules are read back by their number, not by their content",
                "after removal, empty built-in chains of iptables may remain",
                "only root can use the iptables programs, so the daemon can't drop its privileges",
            ],
        };
        if !self.abilities().egress {
            weaknesses.push(FRAMES);
        }
        if !self.abilities().timeouts {
            weaknesses.push(FULL);
        }
        weaknesses
    }

    fn abilities(&self) -> Abilities {
        match self {
            Self::Nftnl(abilities, _) | Self::Nft(_, abilities) => *abilities,
            Self::Iptables(_) => Abilities::NONE,
        }
    }

    /// What of these rules this backend can install.
    pub fn fit<'a>(&self, ruleset: &'a Ruleset) -> Cow<'a, Ruleset> {
        fit(ruleset, self.abilities())
    }

    /// Puts these rules in place of older ones, and reads back what is then there.
    ///
    /// # Errors
    /// The kernel's refusal (nothing was changed), or [`Error::Differs`] (something else changes the rules).
    pub fn apply(&self, ruleset: &Ruleset) -> Result<(), Error> {
        ruleset.check()?;
        let ruleset = &self.fit(ruleset);
        match self {
            Self::Nftnl(_, owner) => with(owner.as_ref(), |netlink| netlink.apply(ruleset)),
            Self::Nft(path, _) => nft::apply(path, ruleset),
            Self::Iptables(programs) => programs.apply(ruleset),
        }
    }

    /// Whether exactly these rules are installed, as far as [`apply`](Self::apply) can read them back.
    pub fn holds(&self, ruleset: &Ruleset) -> Result<bool, Error> {
        if !self.present()? {
            return Ok(false);
        }
        let ruleset = &self.fit(ruleset);
        let found = match self {
            Self::Nftnl(_, owner) => with(owner.as_ref(), |netlink| netlink.verify(ruleset)),
            Self::Nft(path, _) => nft::verify(path, ruleset),
            Self::Iptables(programs) => programs.verify(ruleset),
        };
        match found {
            Ok(()) => Ok(true),
            Err(Error::Differs(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes what any backend made; nothing there is success. Goes on after an error and gives back the first.
    pub fn remove(&self) -> Result<(), Error> {
        let own = match self {
            Self::Nftnl(_, owner) => with(owner.as_ref(), Netlink::remove),
            Self::Nft(path, _) => nft::remove(path),
            // A kernel without nf_tables has no table either; where it has, another backend may have made one.
            Self::Iptables(programs) => {
                drop(with(None, Netlink::remove));
                programs.remove()
            }
        };
        let others = match self {
            Self::Nftnl(..) | Self::Nft(..) if iptables_left() => match Programs::find() {
                Some(programs) => programs.remove(),
                None => Ok(()),
            },
            _ => Ok(()),
        };
        own.and(others)
    }

    /// Whether a firewall of ours is installed.
    pub fn present(&self) -> Result<bool, Error> {
        match self {
            Self::Nftnl(_, owner) => with(owner.as_ref(), Netlink::present),
            Self::Nft(path, _) => nft::present(path),
            Self::Iptables(programs) => programs.present(),
        }
    }
}

/// What of these rules a kernel with these abilities takes.
fn fit(ruleset: &Ruleset, abilities: Abilities) -> Cow<'_, Ruleset> {
    let mut fitting = Cow::Borrowed(ruleset);
    if !abilities.timeouts {
        fitting = Cow::Owned(fitting.without_timeout());
    }
    if !abilities.egress {
        fitting = Cow::Owned(fitting.without_egress());
    }
    fitting
}

/// Asks for everything, and if that is refused for less: a kernel may lack one thing alone.
fn settle(mut probe: impl FnMut(&Ruleset) -> Result<(), Error>) -> Result<Abilities, Error> {
    let Err(mut refusal) = probe(&SAMPLE) else { return Ok(Abilities::ALL) };
    let (no_egress, no_timeouts) =
        (Abilities { egress: false, ..Abilities::ALL }, Abilities { timeouts: false, ..Abilities::ALL });
    for abilities in [no_egress, no_timeouts, Abilities::NONE] {
        let Err(error) = probe(&fit(&SAMPLE, abilities)) else {
            let error = &refusal as &dyn std::error::Error;
            if !abilities.egress {
                tracing::warn!(error, "{FRAMES} (CONFIG_NETFILTER_EGRESS, Linux 5.16)");
            }
            if !abilities.timeouts {
                tracing::warn!(error, "{FULL} (CONFIG_NF_CONNTRACK_TIMEOUT)");
            }
            return Ok(abilities);
        };
        refusal = error;
    }
    Err(refusal)
}

/// Whether chains of the iptables backend can be there. Asks the kernel first: iptables itself would load modules and
/// make tables.
fn iptables_left() -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let legacy = ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"]
        .iter()
        .any(|path| std::fs::read_to_string(path).is_ok_and(|names| !names.trim().is_empty()));
    legacy || with(None, |netlink| netlink.has_iptables_chain(iptables::PREFIX)).unwrap_or(false)
}

/// An error with its causes, in one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(what: &str) -> Result<(), Error> {
        Err(Error::Refused { what: what.to_owned(), hint: String::new(), source: rustix::io::Errno::NOENT.into() })
    }

    #[test]
    fn a_kernel_without_timeouts_gets_the_other_rules() {
        let lacks = |word: &'static str| {
            move |ruleset: &Ruleset| {
                ruleset.lines().iter().find(|line| line.contains(word)).map_or(Ok(()), |line| refused(line))
            }
        };
        assert!(matches!(settle(|_| Ok(())), Ok(Abilities::ALL)));
        let (no_egress, no_timeouts) =
            (Abilities { egress: false, timeouts: true }, Abilities { egress: true, timeouts: false });
        assert_eq!(settle(lacks("ct timeout")).ok(), Some(no_timeouts));
        assert_eq!(settle(lacks("netdev")).ok(), Some(no_egress));
        let neither = |ruleset: &Ruleset| lacks("ct timeout")(ruleset).and(lacks("netdev")(ruleset));
        assert_eq!(settle(neither).ok(), Some(Abilities::NONE));
        assert!(matches!(settle(lacks("fib ")), Err(Error::Refused { what, .. }) if what.contains("fib ")));

        let nftnl = |abilities| Backend::Nftnl(abilities, None);
        assert_eq!(*nftnl(Abilities::ALL).fit(&SAMPLE), *SAMPLE);
        assert_eq!(*nftnl(no_timeouts).fit(&SAMPLE), SAMPLE.without_timeout());
        assert_eq!(*nftnl(no_egress).fit(&SAMPLE), SAMPLE.without_egress());
        assert!(!SAMPLE.without_egress().lines().iter().any(|line| line.contains("netdev")));
        let told = |backend: Backend| {
            let told = |word| backend.weaknesses().iter().any(|text| text.contains(word));
            (told("connection tracking"), told("packet sockets"))
        };
        assert_eq!([told(nftnl(Abilities::ALL)), told(nftnl(Abilities::NONE))], [(false, false), (true, true)]);
        assert_eq!([told(nftnl(no_timeouts)), told(nftnl(no_egress))], [(true, false), (false, true)]);
        let nft = |abilities| Backend::Nft(PathBuf::new(), abilities);
        assert_eq!([told(nft(Abilities::ALL)), told(nft(Abilities::NONE))], [(false, false), (true, true)]);
        assert_eq!(told(iptables()), (true, true));
    }

    fn iptables() -> Backend {
        let path = PathBuf::new;
        Backend::Iptables(Programs { v4: path(), v4_restore: path(), v6: path(), v6_restore: path() })
    }

    #[test]
    fn iptables_is_used_only_where_the_profile_allows_it() {
        let desired = |iptables_fallback| Desired { iptables_fallback, ..Desired::closed() };
        let refused = iptables().permitted(&desired(false)).err().map(|error| error.to_string()).unwrap_or_default();
        for said in ["nf_tables", "IPv4 is switched before IPv6", "iptables-fallback = true", "packet sockets"] {
            assert!(refused.contains(said), "{said}: {refused}");
        }
        assert!(iptables().permitted(&desired(true)).is_ok());
        assert!(Backend::Nftnl(Abilities::NONE, None).permitted(&desired(false)).is_ok());
    }
}
