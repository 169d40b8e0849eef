//! The lock: a table beside ours, behind it on every way out, that lets through only what the daemon sends or has let
//! through. It holds with the daemon and without.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use super::MAX_SESSIONS;
use super::compile::{PRIORITY_FILTER, PRIORITY_LAST, PRIORITY_MANGLE, Refuse, canonical, chain, leaving, rule};
use super::error::Error;
use super::netlink::Netlink;
use super::rules::{Action, Hook, Kind, Match, Policy, Protocol, Rule, Ruleset};
use crate::net::desired::{Desired, MARK};
use crate::net::lock::State;
use crate::net::{Devices, Keep};

/// How far behind our table, which tells the lock what it let through.
const BEHIND: i32 = 10;

/// Compiles the lock. `sessions`: TCP connections from outside, as (local, remote), that were open before: they are kept, up
/// to [`MAX_SESSIONS`].
pub(super) fn lock(sessions: &[(SocketAddr, SocketAddr)]) -> Ruleset {
    let sessions: Vec<_> = sessions
        .iter()
        .map(|(local, remote)| (canonical(*local), canonical(*remote)))
        .filter(|(local, remote)| local.is_ipv4() == remote.is_ipv4())
        .take(MAX_SESSIONS)
        .map(|(local, remote)| rule(Match::segments(local, remote), Action::Accept))
        .collect();
    // The mark is the same that our table sets. A profile that does not answer connections from outside has its table refuse.
    let outside = vec![Match::Syn, Match::CtNew, Match::CtMark(0), Match::ToLocal];
    let outside = vec![rule(vec![Match::Iif("lo".to_owned())], Action::Accept), rule(outside, Action::SetCtMark(MARK))];
    let mut output = open(&sessions);
    output.push(rule(vec![Match::Protocol(Protocol::Tcp)], Action::RejectReset));
    output.push(rule(vec![Match::Protocol(Protocol::Udp)], Action::RejectPort));
    output.push(rule(vec![], Action::RejectProhibited));
    let mut last = open(&sessions);
    last.push(rule(vec![], Action::Drop));
    // What comes back for those behind this machine carries our mark.
    let passed = [Match::Passed, Match::Mark].map(|mark| rule(vec![mark], Action::Accept));
    let forward = passed.into_iter().chain([rule(vec![], Action::Drop)]).collect();
    let filter = |name, hook, priority, policy, rules| chain(name, Kind::Filter, hook, priority, policy, rules);
    let chains = vec![
        filter("prerouting", Hook::Prerouting, PRIORITY_MANGLE + BEHIND, Policy::Accept, outside),
        filter("forward", Hook::Forward, PRIORITY_FILTER + BEHIND, Policy::Drop, forward),
        filter("filter_output", Hook::Output, PRIORITY_FILTER + BEHIND, Policy::Accept, output),
        filter("postrouting", Hook::Postrouting, PRIORITY_LAST + BEHIND, Policy::Drop, last),
    ];
    Ruleset::new(None, chains)
}

/// What may leave: what our table let through, and what may whatever is wanted.
fn open(sessions: &[Rule]) -> Vec<Rule> {
    let mut rules = leaving(&Desired::closed(), &Devices::default(), Refuse::Silently);
    rules.push(rule(vec![Match::Passed], Action::Accept));
    rules.push(rule(vec![Match::CtReply, Match::CtMark(MARK)], Action::Accept));
    rules.extend_from_slice(sessions);
    rules
}

/// Whether there is a lock, and whose.
pub(in crate::net) fn state() -> Result<State, Error> {
    Ok(match Netlink::open()?.of_lock().owner_of_table()? {
        None => State::None,
        Some(0) => State::Plain,
        Some(_) => State::Owned,
    })
}

/// Puts the lock in force; anybody may remove it.
pub(in crate::net) fn install(sessions: &[(SocketAddr, SocketAddr)]) -> Result<(), Error> {
    Netlink::open()?.of_lock().apply(&lock(sessions))
}

/// Puts the lock in force; it belongs to a socket that `store` keeps.
pub(in crate::net) fn install_kept(
    inherited: Option<OwnedFd>,
    store: &dyn Keep,
    sessions: &[(SocketAddr, SocketAddr)],
) -> Result<(), Error> {
    let rules = lock(sessions);
    let adopted = inherited.and_then(|fd| Netlink::adopt(fd).ok());
    let mut netlink = match adopted {
        Some(netlink) => netlink.of_lock(),
        None => {
            let mut netlink = Netlink::open_owner()?.of_lock();
            if let Err(error) = netlink.probe(&rules) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the lock gets no owner: others can remove it"
                );
                return install(sessions);
            }
            // Before there is a table: one whose socket is not kept would go with the process.
            store.keep(crate::net::lock::SOCKET, netlink.fd()).map_err(Error::Socket)?;
            netlink
        }
    };
    netlink.apply(&rules)
}

/// Takes the lock away, and says whether there was one.
pub(in crate::net) fn remove() -> Result<bool, Error> {
    let there = state()? != State::None;
    if there {
        Netlink::open()?.of_lock().remove()?;
    }
    Ok(there)
}
