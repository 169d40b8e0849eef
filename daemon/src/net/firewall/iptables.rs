//! The firewall through iptables and ip6tables: chains of our own, named `PROXYVPN-*`, in front of the others'.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use super::{
    error::Error,
    program::{find, run},
    rules::{Action, Chain, Family, Match, Policy, Rule, Ruleset},
    text::Short,
};
use crate::net::desired::{MARK, PASSED};

/// Beginning of our chains' names.
pub(super) const PREFIX: &str = "PROXYVPN-";

/// Our chain for each chain of the ruleset: (chain, table, built-in chain, ours).
const CHAINS: [(&str, &str, &str, &str); 6] = [
    ("prerouting", "mangle", "PREROUTING", "PROXYVPN-PREROUTING"),
    ("output", "mangle", "OUTPUT", "PROXYVPN-MARK"),
    ("postrouting", "mangle", "POSTROUTING", "PROXYVPN-POSTROUTING"),
    ("input", "filter", "INPUT", "PROXYVPN-INPUT"),
    ("forward", "filter", "FORWARD", "PROXYVPN-FORWARD"),
    ("filter_output", "filter", "OUTPUT", "PROXYVPN-OUTPUT"),
];
const TABLES: [&str; 2] = ["mangle", "filter"];

/// The four programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// `iptables`
    pub v4: PathBuf,
    /// `iptables-restore`
    pub v4_restore: PathBuf,
    /// `ip6tables`
    pub v6: PathBuf,
    /// `ip6tables-restore`
    pub v6_restore: PathBuf,
}

impl Programs {
    /// Finds them in the system's directories.
    pub fn find() -> Option<Self> {
        Some(Self {
            v4: find("iptables")?,
            v4_restore: find("iptables-restore")?,
            v6: find("ip6tables")?,
            v6_restore: find("ip6tables-restore")?,
        })
    }

    /// Per IP version that the kernel has: the version, the program, its restore program.
    fn families(&self) -> impl Iterator<Item = (Family, &Path, &Path)> {
        let v6 = Path::new("/proc/thread-self/net/if_inet6").exists();
        [(Family::V4, &*self.v4, &*self.v4_restore), (Family::V6, &*self.v6, &*self.v6_restore)]
            .into_iter()
            .filter(move |(family, ..)| *family == Family::V4 || v6)
    }

    /// Asks the programs and the kernel whether they would take these rules.
    pub(super) fn probe(&self, ruleset: &Ruleset) -> Result<(), Error> {
        self.families().try_for_each(|(family, _, restore)| {
            let script = script(ruleset, family, |_, _, _| 0);
            run(restore, &["-w", "5", "--noflush", "--test"], &script).map(|_| ())
        })
    }

    /// Puts these rules in place of older ones, table by table, and compares what is then there.
    pub(super) fn apply(&self, ruleset: &Ruleset) -> Result<(), Error> {
        for (family, program, restore) in self.families() {
            let installed = Installed::read(program)?;
            let script = script(ruleset, family, |table, builtin, ours| installed.jumps(table, builtin, ours));
            run(restore, &["-w", "5", "--noflush"], &script)?;
            Installed::read(program)?.compare(ruleset, family)?;
        }
        Ok(())
    }

    /// Compares what is there with these rules; [`Error::Differs`] if that is not the same.
    pub(super) fn verify(&self, ruleset: &Ruleset) -> Result<(), Error> {
        self.families().try_for_each(|(family, program, _)| Installed::read(program)?.compare(ruleset, family))
    }

    /// Removes our chains; none is fine. Goes on after an error and gives back the first.
    pub(super) fn remove(&self) -> Result<(), Error> {
        let mut result = Ok(());
        for (_, program, restore) in self.families() {
            let removed = Installed::read(program).and_then(|installed| match installed.removal() {
                script if script.is_empty() => Ok(()),
                script => run(restore, &["-w", "5", "--noflush"], &script).map(|_| ()),
            });
            result = result.and(removed);
        }
        result
    }

    /// Whether a chain of ours is there.
    pub(super) fn present(&self) -> Result<bool, Error> {
        for (_, program, _) in self.families() {
            if !Installed::read(program)?.removal().is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Input for `iptables-restore --noflush`: a table is replaced as a whole. `jumps` says how many jumps to a chain of ours
/// stand in a built-in one.
fn script(ruleset: &Ruleset, family: Family, jumps: impl Fn(&str, &str, &str) -> usize) -> String {
    let mut script = String::new();
    for table in TABLES {
        script += &format!("*{table}\n");
        let chains = || CHAINS.iter().filter(|(_, t, _, _)| *t == table);
        // Declaring a chain makes it, or empties it.
        for (.., ours) in chains() {
            script += &format!(":{ours} - [0:0]\n");
        }
        for (name, _, builtin, ours) in chains() {
            for rule in ruleset.chains.iter().filter(|chain| chain.name == *name).flat_map(|c| rules(c, family)) {
                script += &format!("-A {ours}{rule}\n");
            }
            for _ in 0..jumps(table, builtin, ours) {
                script += &format!("-D {builtin} -j {ours}\n");
            }
            script += &format!("-I {builtin} 1 -j {ours}\n");
        }
        script += "COMMIT\n";
    }
    script
}

/// The rules of a chain for one IP version, each with a space in front.
fn rules(chain: &Chain, family: Family) -> Vec<String> {
    let mut rules: Vec<String> = chain
        .rules
        .iter()
        .filter(|rule| rule.family().is_none_or(|f| f == family))
        .filter_map(|rule| line(rule, family))
        .collect();
    // Only built-in chains have a policy.
    if chain.policy == Policy::Drop {
        rules.push(" -j DROP".to_owned());
    }
    rules
}

/// A rule as arguments of iptables; `None` for one that iptables has no need of.
fn line(rule: &Rule, family: Family) -> Option<String> {
    let mut line = String::new();
    if let Some(protocol) = rule.protocol() {
        line += &format!(" -p {protocol}");
    }
    for m in &rule.matches {
        // Writing to a string can't fail.
        let _ = match m {
            Match::Iif(name) => write!(line, " -i {name}"),
            Match::Oif(name) => write!(line, " -o {name}"),
            Match::Mark => write!(line, " -m mark --mark {MARK:#x}/0xffffffff"),
            Match::Passed => write!(line, " -m mark --mark {PASSED:#x}/0xffffffff"),
            Match::CtMark(mark) => write!(line, " -m connmark --mark {mark:#x}/0xffffffff"),
            Match::CtNew => write!(line, " -m conntrack --ctstate NEW"),
            Match::CtReply => write!(line, " -m conntrack --ctdir REPLY"),
            Match::ToLocal => write!(line, " -m addrtype --dst-type LOCAL"),
            Match::Family(_) | Match::Protocol(_) => Ok(()),
            // Of chains that iptables does not have, or beyond it.
            Match::EtherType(_) | Match::ArpSender(_) | Match::NdTarget(_) => return None,
            Match::Syn => write!(line, " --tcp-flags FIN,SYN,RST,ACK SYN"),
            Match::NotSyn => write!(line, " ! --tcp-flags FIN,SYN,RST,ACK SYN"),
            Match::Source(net) => write!(line, " -s {}", Short(net)),
            Match::Destination(net) => write!(line, " -d {}", Short(net)),
            Match::SourcePort(_, port) => write!(line, " --sport {port}"),
            Match::DestinationPort(_, port) => write!(line, " --dport {port}"),
            Match::IcmpType(kind) => write!(line, " -m icmp --icmp-type {kind}"),
            Match::HopLimit(limit) => write!(line, " -m hl --hl-eq {limit}"),
            Match::Icmp6Type(kind) => write!(line, " -m icmp6 --icmpv6-type {kind}"),
            Match::User(uid) => write!(line, " -m owner --uid-owner {uid}"),
        };
    }
    let v4 = family == Family::V4;
    let target = match rule.action {
        // Timeouts are a matter of another program (nfct(8)).
        Action::SetTimeout(_) => return None,
        Action::SetMark(mark) => format!("MARK --set-xmark {mark:#x}/0xffffffff"),
        Action::SetCtMark(mark) => format!("CONNMARK --set-xmark {mark:#x}/0xffffffff"),
        // There is no lock where there is no nf_tables.
        Action::Accept | Action::Pass => "RETURN".to_owned(),
        Action::Drop => "DROP".to_owned(),
        Action::RejectReset => "REJECT --reject-with tcp-reset".to_owned(),
        Action::RejectPort if v4 => "REJECT --reject-with icmp-port-unreachable".to_owned(),
        Action::RejectPort => "REJECT --reject-with icmp6-port-unreachable".to_owned(),
        Action::RejectProhibited if v4 => "REJECT --reject-with icmp-admin-prohibited".to_owned(),
        Action::RejectProhibited => "REJECT --reject-with icmp6-adm-prohibited".to_owned(),
    };
    Some(format!("{line} -j {target}"))
}

/// What is installed: per table, the lines of `iptables -S`.
struct Installed(Vec<(&'static str, Vec<String>)>);

impl Installed {
    fn read(program: &Path) -> Result<Self, Error> {
        let read = |table| {
            let lines = run(program, &["-w", "5", "-t", table, "-S"], "")?;
            Ok((table, lines.lines().map(|line| line.trim().to_owned()).collect()))
        };
        TABLES.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    fn lines(&self, table: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(t, _)| *t == table).flat_map(|(_, lines)| lines.iter().map(String::as_str))
    }

    fn jumps(&self, table: &str, builtin: &str, ours: &str) -> usize {
        let jump = format!("-A {builtin} -j {ours}");
        self.lines(table).filter(|line| *line == jump).count()
    }

    /// Input for `iptables-restore --noflush` that removes what is ours; empty if there is nothing.
    fn removal(&self) -> String {
        let mut script = String::new();
        for table in TABLES {
            let mut lines = String::new();
            let there = |ours: &str| self.lines(table).any(|line| line == format!("-N {ours}"));
            let chains: Vec<_> = CHAINS.iter().filter(|(_, t, _, ours)| *t == table && there(ours)).collect();
            for (_, _, builtin, ours) in &chains {
                for _ in 0..self.jumps(table, builtin, ours) {
                    lines += &format!("-D {builtin} -j {ours}\n");
                }
            }
            for (.., ours) in &chains {
                lines += &format!("-F {ours}\n-X {ours}\n");
            }
            if !lines.is_empty() {
                script += &format!("*{table}\n{lines}COMMIT\n");
            }
        }
        script
    }

    /// Compares the number of rules, the last rule of a dropping chain, and that ours is the first that a packet meets.
    fn compare(&self, ruleset: &Ruleset, family: Family) -> Result<(), Error> {
        for (name, table, builtin, ours) in CHAINS {
            let want: usize =
                ruleset.chains.iter().filter(|chain| chain.name == name).map(|c| rules(c, family).len()).sum();
            let drops = ruleset.chains.iter().any(|chain| chain.name == name && chain.policy == Policy::Drop);
            let start = format!("-A {ours} ");
            let have: Vec<_> = self.lines(table).filter(|line| line.starts_with(&start)).collect();
            if have.len() != want {
                return Err(Error::Differs(format!("chain {ours} has {} rules instead of {want}", have.len())));
            }
            if drops && have.last().is_none_or(|line| *line != format!("-A {ours} -j DROP")) {
                return Err(Error::Differs(format!("chain {ours} does not end with DROP")));
            }
            let start = format!("-A {builtin} ");
            let first = self.lines(table).find(|line| line.starts_with(&start));
            if first != Some(&*format!("-A {builtin} -j {ours}")) || self.jumps(table, builtin, ours) != 1 {
                return Err(Error::Differs(format!("chain {ours} is not the first of {builtin}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::firewall::compile::{
        compile,
        tests::{desired, devices},
    };

    #[test]
    fn each_ip_version_gets_its_rules_and_older_jumps_go() {
        let ruleset = compile(&desired(), &[], &devices());
        let v4 = script(&ruleset, Family::V4, |_, builtin, _| usize::from(builtin == "FORWARD") * 2);
        let v6 = script(&ruleset, Family::V6, |_, _, _| 0);
        for line in [
            "-A PROXYVPN-PREROUTING -i pvpn0 -j RETURN",
            "-A PROXYVPN-PREROUTING -p tcp --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -m connmark --mark 0x0/0xffffffff -m addrtype --dst-type LOCAL -j CONNMARK --set-xmark 0x7076706e/0xffffffff",
            "-A PROXYVPN-POSTROUTING -d 9.9.9.9 -p udp --dport 53 -j RETURN",
            "-A PROXYVPN-POSTROUTING -j DROP",
            "-A PROXYVPN-FORWARD -j DROP",
            "-A PROXYVPN-OUTPUT -j REJECT --reject-with icmp-admin-prohibited",
            "-D FORWARD -j PROXYVPN-FORWARD\n-D FORWARD -j PROXYVPN-FORWARD\n-I FORWARD 1 -j PROXYVPN-FORWARD",
        ] {
            let line = line.replace("-d 9.9.9.9 -p udp", "-p udp -d 9.9.9.9");
            assert!(v4.contains(&format!("{line}\n")), "{line}\n{v4}");
        }
        assert!(
            v6.contains(
                "-A PROXYVPN-POSTROUTING -p ipv6-icmp -m icmp6 --icmpv6-type 135 -m hl --hl-eq 255 -j RETURN\n"
            ),
            "{v6}"
        );
        assert!(!v6.contains("9.9.9.9") && !v4.contains("icmp6"));
        assert!(!v6.contains("-D "));
    }

    #[test]
    fn removal_names_only_what_is_ours() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect();
        let filter =
            "-P FORWARD DROP\n-N DOCKER\n-N PROXYVPN-FORWARD\n-A FORWARD -j PROXYVPN-FORWARD\n-A FORWARD -j DOCKER";
        let installed = Installed(vec![("mangle", vec![]), ("filter", lines(filter))]);
        let want = "*filter\n-D FORWARD -j PROXYVPN-FORWARD\n-F PROXYVPN-FORWARD\n-X PROXYVPN-FORWARD\nCOMMIT\n";
        assert_eq!(installed.removal(), want);
        assert_eq!(Installed(vec![("filter", lines("-N DOCKER"))]).removal(), "");
    }

    #[test]
    fn any_difference_is_seen() {
        let ruleset = compile(&desired(), &[], &devices());
        let text = script(&ruleset, Family::V4, |_, _, _| 0);
        // What `iptables -S` says of it: only how rules are written differs.
        let listed = |text: &str| {
            let tables = text.split("COMMIT\n").zip(TABLES);
            Installed(
                tables
                    .map(|(part, table)| (table, part.replace("-I ", "-A ").replace(" 1 -j", " -j")))
                    .map(|(t, p)| (t, p.lines().map(str::to_owned).collect()))
                    .collect(),
            )
        };
        assert!(listed(&text).compare(&ruleset, Family::V4).is_ok());
        for (what, from, to) in [
            ("a rule less", "-A PROXYVPN-OUTPUT -o lo -j RETURN\n", ""),
            ("a rule more", "-A PROXYVPN-OUTPUT -o lo", "-A PROXYVPN-OUTPUT -j RETURN\n-A PROXYVPN-OUTPUT -o lo"),
            ("no drop", "-A PROXYVPN-POSTROUTING -j DROP", "-A PROXYVPN-POSTROUTING -j RETURN"),
            ("no jump", "-I FORWARD 1 -j PROXYVPN-FORWARD\n", ""),
            ("another's rule first", "-I FORWARD 1", "-A FORWARD -j ACCEPT\n-I FORWARD 1"),
        ] {
            let other = text.replace(from, to);
            assert_ne!(other, text, "{what}");
            assert!(matches!(listed(&other).compare(&ruleset, Family::V4), Err(Error::Differs(_))), "{what}");
        }
    }
}
