//! One transaction: all or nothing (nfnetlink's `NFNL_MSG_BATCH_BEGIN` … `END`).

use std::ffi::{CStr, CString};

use nftnl::{
    Batch, Chain as NftChain, ChainType, Hook as NftHook, MsgType, NlMsg, Policy as NftPolicy, ProtoFamily, Rule, Table,
};

use super::{
    lower,
    sys::{Raw, Zeroed},
    timeout,
};
use crate::net::{
    desired::NFT_TABLE,
    firewall::rules::{Chain, Hook, Kind, Policy, Ruleset},
    firewall::text::Base,
};

/// The tables of one name in both families.
pub(super) struct Tables {
    inet: Table,
    netdev: Table,
}

impl Tables {
    pub(super) fn new(name: &CStr) -> Self {
        Self { inet: Table::new(name, ProtoFamily::Inet), netdev: Table::new(name, ProtoFamily::NetDev) }
    }
}

/// Messages, each with what it says in nft notation.
#[derive(Default)]
pub(super) struct Transaction {
    batch: Batch,
    /// Per message, without begin and end.
    pub(super) labels: Vec<String>,
}

impl Transaction {
    /// Adds a message.
    pub(super) fn add<T: NlMsg>(&mut self, message: &T, kind: MsgType, label: impl Into<String>) {
        self.batch.add(&Zeroed(message), kind);
        self.labels.push(label.into());
    }

    /// Adds all objects, chains and rules; without `hooked` no packet comes through them.
    pub(super) fn add_ruleset(&mut self, tables: &Tables, ruleset: &Ruleset, hooked: bool) {
        if let Some(timeout) = &ruleset.timeout {
            let message = Raw(timeout::add(tables.inet.get_name(), timeout));
            self.add(&message, MsgType::Add, format!("inet {NFT_TABLE} {timeout}"));
        }
        for chain in &ruleset.chains {
            let (label, egress) = (chain.label(), chain.is_egress());
            let table = if egress { &tables.netdev } else { &tables.inet };
            // A name without NUL: one of our constants, and the name of a device.
            let mut nft = NftChain::new(CString::new(chain.name.as_str()).unwrap_or_default(), table);
            // Whether there is such a hook shows only when one asks for it; for a transaction that ends without the chain
            // no policy comes into force.
            if hooked || egress {
                hook(&mut nft, chain);
            }
            self.add(&nft, MsgType::Add, format!("{label} {{ {} }}", Base(chain)));
            for rule in &chain.rules {
                let mut message = Rule::new(&nft);
                for expr in lower::rule(rule, egress) {
                    message.add_expr(&expr);
                }
                self.add(&message, MsgType::Add, format!("{label} {}", chain.text(rule)));
            }
        }
    }

    /// The messages with begin and end, as one buffer: the kernel takes a transaction only from one send.
    pub(super) fn finish(self) -> (Vec<u8>, Vec<String>) {
        (self.batch.finalize().iter().flatten().copied().collect(), self.labels)
    }
}

fn hook(nft: &mut NftChain<'_>, chain: &Chain) {
    let hook = match &chain.hook {
        Hook::Egress(device) => {
            nft.set_device(CString::new(device.as_str()).unwrap_or_default());
            // NF_NETDEV_EGRESS has the number of NF_INET_LOCAL_IN (linux/netfilter.h).
            NftHook::In
        }
        Hook::Prerouting => NftHook::PreRouting,
        Hook::Input => NftHook::In,
        Hook::Forward => NftHook::Forward,
        Hook::Output => NftHook::Out,
        Hook::Postrouting => NftHook::PostRouting,
    };
    nft.set_hook(hook, chain.priority);
    nft.set_type(match chain.kind {
        Kind::Filter => ChainType::Filter,
        Kind::Route => ChainType::Route,
    });
    nft.set_policy(match chain.policy {
        Policy::Accept => NftPolicy::Accept,
        Policy::Drop => NftPolicy::Drop,
    });
}
