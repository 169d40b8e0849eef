//! One transaction: all or nothing (nfnetlink's `NFNL_MSG_BATCH_BEGIN` … `END`).

use std::ffi::CString;

use nftnl::{Batch, Chain as NftChain, ChainType, Hook as NftHook, MsgType, NlMsg, Policy as NftPolicy, Rule, Table};

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
    pub(super) fn add_ruleset(&mut self, table: &Table, ruleset: &Ruleset, hooked: bool) {
        if let Some(timeout) = &ruleset.timeout {
            let message = Raw(timeout::add(table.get_name(), timeout));
            self.add(&message, MsgType::Add, format!("inet {NFT_TABLE} {timeout}"));
        }
        for chain in &ruleset.chains {
            let label = format!("inet {NFT_TABLE} {}", chain.name);
            // A name without NUL: it is one of our constants.
            let mut nft = NftChain::new(CString::new(chain.name).unwrap_or_default(), table);
            if hooked {
                hook(&mut nft, chain);
            }
            self.add(&nft, MsgType::Add, format!("{label} {{ {} }}", Base(chain)));
            for rule in &chain.rules {
                let mut message = Rule::new(&nft);
                for expr in lower::rule(rule) {
                    message.add_expr(&expr);
                }
                self.add(&message, MsgType::Add, format!("{label} {rule}"));
            }
        }
    }

    /// The messages with begin and end, as one buffer: the kernel takes a transaction only from one send.
    pub(super) fn finish(self) -> (Vec<u8>, Vec<String>) {
        (self.batch.finalize().iter().flatten().copied().collect(), self.labels)
    }
}

fn hook(nft: &mut NftChain<'_>, chain: &Chain) {
    let hook = match chain.hook {
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
