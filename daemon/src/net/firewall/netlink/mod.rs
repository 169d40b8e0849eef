//! The firewall over netlink, with libnftnl: needs `CAP_NET_ADMIN` and nothing else.
//!
//! - `lower`: rules to expressions of nf_tables
//! - `batch`: one transaction
//! - `request`: what is asked for
//! - `socket`: sending, and matching answers by sequence number
//! - `table`: the table itself
//! - `sys`: what nftnl has no safe wrapper for
//! - `timeout`: the object that holds a timeout

mod batch;
mod lower;
mod request;
mod socket;
mod sys;
mod table;
mod timeout;

use std::{
    ffi::CStr,
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use nftnl::{MsgType, ProtoFamily};
use rustix::io::Errno;

use self::{
    batch::{Tables, Transaction},
    socket::Socket,
    sys::Raw,
};
use super::{error::Error, rules::Ruleset};

/// [`NFT_TABLE`](crate::net::desired::NFT_TABLE) for C.
const TABLE: &CStr = c"proxyvpn";
/// [`LOCK_TABLE`](crate::net::desired::LOCK_TABLE) for C.
const LOCK: &CStr = c"proxyvpn-lock";
/// Table of the probe. It is made and deleted in one transaction and so never seen.
const PROBE: &CStr = c"proxyvpn-probe";

/// The firewall's connection to the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    /// The table belongs to this socket: nobody else can change it, and it goes when the last copy is closed.
    owner: bool,
    /// Name of the table.
    table: &'static CStr,
}

impl Netlink {
    /// Opens a connection to the firewall of the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, Error> {
        Socket::open().map(|socket| Self { socket, owner: false, table: TABLE })
    }

    /// The same, and tables made through it belong to it.
    pub(super) fn open_owner() -> Result<Self, Error> {
        Ok(Self { owner: true, ..Self::open()? })
    }

    /// The connection of an earlier process, to which its table belongs.
    pub(super) fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        Socket::adopt(fd).map(|socket| Self { socket, owner: true, table: TABLE })
    }

    /// The same for the table of the lock.
    pub(super) const fn of_lock(mut self) -> Self {
        self.table = LOCK;
        self
    }

    /// Its descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    /// Asks the kernel whether it would take these rules, and leaves nothing. Only chains at the exit of a device get their
    /// hook, and no packet can meet the others.
    pub(super) fn probe(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let mut transaction = Transaction::default();
        for family in families(ruleset) {
            add_table(&mut transaction, PROBE, family, self.owner);
        }
        transaction.add_ruleset(&Tables::new(PROBE), ruleset, false);
        for family in families(ruleset) {
            delete_table(&mut transaction, PROBE, family);
        }
        self.socket.commit(transaction).map(|_| ())
    }

    /// Puts these rules in place of older ones, in one transaction, and compares what is then there.
    pub(super) fn apply(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let sent = self.socket.commit(replacement(self.table, ruleset, self.owner))?;
        self.read_back(ruleset, &sent)
    }

    /// Compares what is there with these rules; [`Error::Differs`] if that is not the same.
    pub(super) fn verify(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let (bytes, _) = replacement(self.table, ruleset, self.owner).finish();
        let sent: Vec<Vec<u8>> = socket::messages(&bytes).map(<[u8]>::to_vec).collect();
        self.read_back(ruleset, &sent)
    }

    fn read_back(&mut self, ruleset: &Ruleset, sent: &[Vec<u8>]) -> Result<(), Error> {
        let (mut chains, mut rules) = (vec![], vec![]);
        for family in families(ruleset) {
            if self.owner && self.owner_in(family)? != Some(self.socket.port()?) {
                return Err(Error::Differs("the table does not belong to the daemon".to_owned()));
            }
            chains.extend(self.socket.request(request::chains(family))?);
            rules.extend(self.socket.request(request::rules(self.table, family))?);
        }
        let objects = self.socket.request(request::objects(self.table))?;
        compare(self.table, sent, &chains, &rules, &objects)
    }

    /// Removes the tables; none is fine.
    pub(super) fn remove(&mut self) -> Result<(), Error> {
        let mut transaction = Transaction::default();
        delete_tables(&mut transaction, self.table);
        self.socket.commit(transaction).map(|_| ())
    }

    /// Port of the netlink socket to which the table belongs, 0 if to none; `None` if there is no table.
    pub(super) fn owner_of_table(&mut self) -> Result<Option<u32>, Error> {
        self.owner_in(ProtoFamily::Inet)
    }

    fn owner_in(&mut self, family: ProtoFamily) -> Result<Option<u32>, Error> {
        match self.socket.request(request::table(self.table, family)) {
            Ok(answer) => Ok(answer.iter().find_map(|message| table::owner(message))),
            Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether one of the tables is there.
    pub(super) fn present(&mut self) -> Result<bool, Error> {
        let inet = self.owner_of_table()?;
        Ok(inet.is_some() || self.owner_in(ProtoFamily::NetDev)?.is_some())
    }

    /// Names of chains in iptables' own tables (`ip` and `ip6`) that start with `prefix`.
    pub(super) fn has_iptables_chain(&mut self, prefix: &str) -> Result<bool, Error> {
        for family in [ProtoFamily::Ipv4, ProtoFamily::Ipv6] {
            let messages = self.socket.request(request::chains(family))?;
            if messages.iter().filter_map(|m| sys::chain(m)).any(|chain| chain.name.starts_with(prefix)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// These rules in place of older ones, whether the table had an owner or not. `owned`: it belongs to the sending socket.
fn replacement(table: &CStr, ruleset: &Ruleset, owned: bool) -> Transaction {
    let mut transaction = Transaction::default();
    delete_tables(&mut transaction, table);
    for family in families(ruleset) {
        add_table(&mut transaction, table, family, owned);
    }
    transaction.add_ruleset(&Tables::new(table), ruleset, true);
    transaction
}

/// Families of the tables that hold these rules.
fn families(ruleset: &Ruleset) -> impl Iterator<Item = ProtoFamily> + use<> {
    [ProtoFamily::Inet].into_iter().chain(ruleset.has_egress().then_some(ProtoFamily::NetDev))
}

fn add_table(transaction: &mut Transaction, name: &CStr, family: ProtoFamily, owned: bool) {
    let flags = if owned { " { flags owner; }" } else { "" };
    let label = format!("{}{flags}", label(name, family));
    transaction.add(&Raw(table::add(name, family, owned)), MsgType::Add, label);
}

fn delete_table(transaction: &mut Transaction, name: &CStr, family: ProtoFamily) {
    transaction.add(&Raw(table::delete(name, family)), MsgType::Del, format!("delete {}", label(name, family)));
}

/// Makes the deletion of both succeed also when there are none.
fn delete_tables(transaction: &mut Transaction, name: &CStr) {
    for family in [ProtoFamily::Inet, ProtoFamily::NetDev] {
        add_table(transaction, name, family, false);
        delete_table(transaction, name, family);
    }
}

fn label(name: &CStr, family: ProtoFamily) -> String {
    let family = if family == ProtoFamily::NetDev { "netdev" } else { "inet" };
    format!("table {family} {}", name.to_string_lossy())
}

/// Compares objects, chains and rules that are installed, expression by expression, with those that were sent.
fn compare(
    table: &CStr,
    sent: &[Vec<u8>],
    chains: &[Vec<u8>],
    rules: &[Vec<u8>],
    objects: &[Vec<u8>],
) -> Result<(), Error> {
    let ours = |messages: &[Vec<u8>]| -> Vec<timeout::Object> {
        let all = messages.iter().filter_map(|m| timeout::object(m));
        all.filter(|object| object.table == table.to_bytes()).collect()
    };
    let (want, have) = (ours(sent), ours(objects));
    if want != have {
        return Err(Error::Differs(format!("{} objects instead of {}, or of another kind", have.len(), want.len())));
    }
    let table = table.to_string_lossy();
    let ours = |messages: &[Vec<u8>]| -> Vec<sys::Chain> {
        messages.iter().filter_map(|m| sys::chain(m)).filter(|chain| chain.table == table).collect()
    };
    let (want, have) = (ours(sent), ours(chains));
    if want != have {
        return Err(Error::Differs(format!("{} chains instead of {}, or of another kind", have.len(), want.len())));
    }
    for chain in &want {
        let of = |messages: &[Vec<u8>]| -> Vec<sys::Rule> {
            let all = messages.iter().filter_map(|m| sys::rule(m));
            all.filter(|rule| rule.table == table && rule.chain == chain.name).collect()
        };
        let (want, have) = (of(sent), of(rules));
        if want.len() != have.len() {
            let (want, have) = (want.len(), have.len());
            return Err(Error::Differs(format!("chain {} has {have} rules instead of {want}", chain.name)));
        }
        if let Some(at) = want.iter().zip(&have).position(|(want, have)| want != have) {
            return Err(Error::Differs(format!("rule {} of chain {}", at + 1, chain.name)));
        }
    }
    Ok(())
}

/// What a kernel error means, and what helps. `None`: it is about the whole transaction or request.
fn refused(what: Option<&str>, errno: i32) -> Error {
    let source = io::Error::from_raw_os_error(errno);
    let whole = what.is_none();
    let what = what.unwrap_or("the whole request").to_owned();
    match Errno::from_raw_os_error(errno) {
        // The capability is asked for before the first part is looked at.
        Errno::PERM | Errno::ACCESS if whole => Error::Privilege,
        Errno::PERM | Errno::ACCESS => Error::Owned,
        Errno::NOENT | Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => {
            let modules = modules(&what);
            let hint =
                format!("; the kernel lacks a module for it: load it (modprobe {modules}) or use a kernel that has it");
            Error::Refused { what, hint, source }
        }
        Errno::BUSY | Errno::EXIST => {
            let hint = "; another program changes the table at the same time".to_owned();
            Error::Refused { what, hint, source }
        }
        _ => Error::Refused { what, hint: String::new(), source },
    }
}

/// The kernel modules behind a line in nft notation.
fn modules(what: &str) -> String {
    let mut modules = vec!["nf_tables"];
    for (word, module) in [("fib ", "nft_fib_inet"), ("ct ", "nft_ct"), ("reject ", "nft_reject_inet")] {
        if what.contains(word) {
            modules.push(module);
        }
    }
    modules.join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;
    use crate::net::{
        desired::Desired,
        firewall::{
            compile,
            compile::tests::{desired, devices},
            rules::Timeout,
        },
    };

    /// The messages of a transaction.
    fn messages(desired: &Desired) -> Vec<Vec<u8>> {
        let mut transaction = Transaction::default();
        transaction.add_ruleset(&Tables::new(TABLE), &compile(desired, &[], &devices()), true);
        socket::messages(&transaction.finish().0).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn any_difference_is_seen() {
        let sent = messages(&desired());
        compare(TABLE, &sent, &sent, &sent, &sent).unwrap();
        let mut user = desired();
        user.exceptions.users = vec![14];
        let mut net = desired();
        net.exceptions.lan[0] = "192.168.7.0/25".parse().unwrap();
        let off = Desired { killswitch: false, ..desired() };
        let less = Desired { inbound_replies: false, ..desired() };
        for (what, other) in [("user", user), ("net", net), ("chains", off), ("rules", less)] {
            let other = messages(&other);
            assert!(matches!(compare(TABLE, &sent, &other, &other, &sent), Err(Error::Differs(_))), "{what}");
        }
        assert!(compare(TABLE, &sent, &sent, &[], &sent).is_err());
        assert!(compare(TABLE, &sent, &[], &[], &sent).is_err());
        assert!(compare(TABLE, &sent, &sent, &sent, &[]).is_err());
        let longer = Timeout { name: "tunnelled", time_wait: 120 };
        assert!(compare(TABLE, &sent, &sent, &sent, &[timeout::add(TABLE, &longer)]).is_err());
    }

    #[test]
    fn a_message_does_not_depend_on_what_was_in_memory() {
        let first = messages(&desired());
        for fill in [0u8, 1, b'V', 0xff] {
            // The allocator hands out again what was freed last.
            drop(vec![vec![fill; 1 << 17]; 4]);
            assert_eq!(messages(&desired()), first);
        }
    }

    #[test]
    fn messages_cut_anywhere_are_refused_without_a_panic() {
        for message in messages(&desired()) {
            for length in 0..message.len() {
                let cut = &message[..length];
                assert!(sys::chain(cut).is_none() && sys::rule(cut).is_none() && timeout::object(cut).is_none());
            }
        }
    }

    #[test]
    fn names_missing_modules_and_the_missing_capability() {
        let error = refused(Some("inet proxyvpn prerouting fib daddr type local meta mark set 0x7076706e"), 2);
        assert!(error.to_string().contains("modprobe nf_tables nft_fib_inet)"), "{error}");
        assert!(matches!(refused(None, 1), Error::Privilege));
        assert!(matches!(refused(Some("table"), 1), Error::Owned));
        assert_eq!(TABLE.to_str(), Ok(crate::net::desired::NFT_TABLE));
        assert_eq!(LOCK.to_str(), Ok(crate::net::desired::LOCK_TABLE));
    }
}
