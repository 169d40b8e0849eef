//! The firewall through the `nft` program: one transaction too, but as root only.

use std::path::Path;

use super::{
    error::Error,
    program::run,
    rules::{Policy, Ruleset},
    text::{Base, REMOVAL},
};
use crate::net::desired::NFT_TABLE;

/// Asks nft and the kernel whether they would take these rules; changes nothing.
pub(super) fn probe(nft: &Path, ruleset: &Ruleset) -> Result<(), Error> {
    run(nft, &["-c", "-f", "-"], &ruleset.script()).map(|_| ())
}

/// Puts these rules in place of older ones and compares what is then there.
pub(super) fn apply(nft: &Path, ruleset: &Ruleset) -> Result<(), Error> {
    run(nft, &["-f", "-"], &ruleset.script())?;
    verify(nft, ruleset)
}

/// Compares what is there with these rules; [`Error::Differs`] if that is not the same.
pub(super) fn verify(nft: &Path, ruleset: &Ruleset) -> Result<(), Error> {
    let mut listing = run(nft, &["list", "table", "inet", NFT_TABLE], "")?;
    // There is none where no device leads out.
    if tables(nft)?.contains(&"netdev") {
        listing += &run(nft, &["list", "table", "netdev", NFT_TABLE], "")?;
    }
    compare(ruleset, &listing)
}

/// Removes the tables; none is fine.
pub(super) fn remove(nft: &Path) -> Result<(), Error> {
    run(nft, &["-f", "-"], REMOVAL).map(|_| ())
}

/// Whether a table is there.
pub(super) fn present(nft: &Path) -> Result<bool, Error> {
    tables(nft).map(|families| !families.is_empty())
}

/// Families of our tables that are there.
fn tables(nft: &Path) -> Result<Vec<&'static str>, Error> {
    let tables = run(nft, &["list", "tables"], "")?;
    let there = |family: &&str| tables.lines().any(|line| line.trim() == format!("table {family} {NFT_TABLE}"));
    Ok(["inet", "netdev"].into_iter().filter(there).collect())
}

/// Compares objects by their names, chains, their hooks and policies, and the number of rules: the text of a rule differs
/// between versions of nft.
fn compare(ruleset: &Ruleset, listing: &str) -> Result<(), Error> {
    let mut have: Vec<(&str, &str, usize)> = vec![];
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            have.push((name, "", 0));
        } else if let Some((_, base, rules)) = have.last_mut() {
            match line {
                "" | "}" => {}
                _ if line.starts_with("table ") => {}
                _ if line.starts_with("type ") => *base = line,
                _ => *rules += 1,
            }
        }
    }
    let timeouts: Vec<_> = listing.lines().filter_map(|line| line.trim().strip_prefix("ct timeout ")).collect();
    let same = timeouts.len() == usize::from(ruleset.timeout.is_some())
        && ruleset.timeout.iter().zip(&timeouts).all(|(want, have)| have.split(' ').next() == Some(want.name));
    if !same {
        return Err(Error::Differs(format!("{} timeouts, or others", timeouts.len())));
    }
    if have.len() != ruleset.chains.len() {
        return Err(Error::Differs(format!("{} chains instead of {}", have.len(), ruleset.chains.len())));
    }
    for chain in &ruleset.chains {
        let want = Base(chain).to_string();
        // How a priority is written differs too.
        let kind = want.split(" priority ").next().unwrap_or_default();
        let policy = match chain.policy {
            Policy::Accept => "policy accept;",
            Policy::Drop => "policy drop;",
        };
        let same = have.iter().any(|(name, base, rules)| {
            *name == chain.name && base.starts_with(kind) && base.ends_with(policy) && *rules == chain.rules.len()
        });
        if !same {
            return Err(Error::Differs(format!("chain {}", chain.name)));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;
    use crate::net::firewall::compile::tests::{desired, devices};

    #[test]
    fn a_listing_that_differs_is_an_error() {
        let ruleset = super::super::compile(&desired(), &[], &devices());
        let script = ruleset.script();
        let listing = script.split_once("delete table inet proxyvpn\n").unwrap().1;
        compare(&ruleset, listing).unwrap();
        for (what, other) in [
            ("a policy", listing.replace("priority 300; policy drop;", "priority 300; policy accept;")),
            ("a rule less", listing.replacen("\t\toifname \"lo\" accept\n", "", 1)),
            ("a rule more", listing.replacen("\t\toifname \"lo\" accept\n", "\t\taccept\n\t\taccept\n", 1)),
            ("a hook", listing.replace("type route hook output", "type filter hook output")),
            ("no timeout", listing.replace("\tct timeout tunnelled {", "\t{")),
            ("another timeout", listing.replace("\tct timeout tunnelled {", "\tct timeout other {")),
            ("a chain less", listing.replace("chain forward {", "")),
            ("nothing", String::new()),
        ] {
            assert_ne!(other, listing, "{what}");
            assert!(matches!(compare(&ruleset, &other), Err(Error::Differs(_))), "{what}");
        }
    }
}
