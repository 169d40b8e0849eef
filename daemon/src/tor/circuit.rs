//! Circuits and their relays (control-spec sections 3.9 and 4.1.1).

use std::net::IpAddr;

use super::event::MAX_WORD;
use super::reply::keywords;
use crate::lines::clean;

/// Circuits that are told.
const MAX_CIRCUITS: usize = 32;
/// Relays of one; Tor takes 3, to an onion service up to 8.
const MAX_RELAYS: usize = 8;
/// Tor's own traffic, of which nobody asks where it goes: directory requests, measurements, what is only kept for later.
const OWN: [&str; 6] =
    ["HS_VANGUARDS", "PATH_BIAS_TESTING", "MEASURE_TIMEOUT", "TESTING", "CIRCUIT_PADDING", "CONTROLLER"];

/// A circuit that carries, or can carry, the host's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Circuit {
    /// Tor's number of it.
    pub id: u32,
    /// As in `GENERAL`, `CONFLUX_LINKED` or `HS_CLIENT_REND`.
    pub purpose: String,
    /// Since when, in UTC: `2026-01-31T12:00:00.000000`. Empty when Tor does not say.
    pub created: String,
    /// From the guard to the last relay.
    pub path: Vec<Relay>,
}

/// A relay of a circuit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Of its identity key, 40 hexadecimal digits.
    pub fingerprint: String,
    /// As it calls itself; anybody can take any name.
    pub nickname: String,
    /// Where it is; `None` for a bridge, which is in no consensus.
    pub address: Option<IpAddr>,
    /// ISO 3166-1 in lower case, as Tor's own database says.
    pub country: Option<String>,
}

/// From the lines of `circuit-status`: those that are built and of use to the host.
pub(super) fn circuits<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Circuit> {
    lines.filter_map(circuit).take(MAX_CIRCUITS).collect()
}

fn circuit(line: &str) -> Option<Circuit> {
    let mut words = line.split_ascii_whitespace();
    let id = words.next()?.parse().ok()?;
    if words.next()? != "BUILT" {
        return None;
    }
    let path: Vec<_> = words.next()?.split(',').filter_map(relay).take(MAX_RELAYS).collect();
    let value = |name| {
        keywords(line).find(|(key, _)| *key == name).map(|(_, value)| clean(&value, MAX_WORD)).unwrap_or_default()
    };
    let purpose = value("PURPOSE");
    let directory = value("BUILD_FLAGS").split(',').any(|flag| flag == "ONEHOP_TUNNEL");
    let used = !directory && !path.is_empty() && !purpose.starts_with("HS_SERVICE") && !OWN.contains(&&*purpose);
    used.then(|| Circuit { id, created: value("TIME_CREATED"), purpose, path })
}

/// `$FINGERPRINT~nickname`, with `=` for `~` in old ones.
fn relay(text: &str) -> Option<Relay> {
    let (fingerprint, nickname) = text.split_once(['~', '=']).unwrap_or((text, ""));
    let fingerprint = fingerprint.strip_prefix('$')?;
    let fits = fingerprint.len() == 40 && fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| Relay {
        fingerprint: fingerprint.to_owned(),
        nickname: clean(nickname, 19),
        address: None,
        country: None,
    })
}

/// The address in an entry of the consensus (`ns/id/…`): its line `r nickname identity digest date time address port port`.
pub(super) fn address<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<IpAddr> {
    lines.find_map(|line| line.strip_prefix("r "))?.split(' ').rev().nth(2)?.parse().ok()
}

/// The country in the value of `ip-to-country/…`; `??` is none.
pub(super) fn country(value: &str) -> Option<String> {
    (value.len() == 2 && value.bytes().all(|byte| byte.is_ascii_alphabetic())).then(|| value.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA~guard";
    const B: &str = "$BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB=middle";

    #[test]
    fn only_built_circuits_of_use_are_told() {
        let lines = [
            format!(
                "1 BUILT {A},{B} BUILD_FLAGS=NEED_CAPACITY PURPOSE=GENERAL TIME_CREATED=2026-01-31T12:00:00.000000"
            ),
            format!("2 BUILT {A} BUILD_FLAGS=ONEHOP_TUNNEL,IS_INTERNAL PURPOSE=GENERAL"),
            format!("3 EXTENDED {A},{B} PURPOSE=GENERAL"),
            format!("4 BUILT {A},{B} BUILD_FLAGS=IS_INTERNAL PURPOSE=HS_CLIENT_REND HS_STATE=HSCR_JOINED"),
            format!("5 BUILT {A},{B} PURPOSE=MEASURE_TIMEOUT"),
            format!("6 BUILT {A},{B} PURPOSE=CONFLUX_LINKED CONFLUX_ID=1"),
            "7 LAUNCHED PURPOSE=GENERAL".to_owned(),
            "x BUILT $A PURPOSE=GENERAL".to_owned(),
            "8 BUILT $short PURPOSE=GENERAL".to_owned(),
            String::new(),
        ];
        let told = circuits(lines.iter().map(|line| &**line));
        let ids: Vec<_> = told.iter().map(|circuit| (circuit.id, &*circuit.purpose)).collect();
        assert_eq!(ids, [(1, "GENERAL"), (4, "HS_CLIENT_REND"), (6, "CONFLUX_LINKED")]);
        assert_eq!(told[0].created, "2026-01-31T12:00:00.000000");
        let names: Vec<_> = told[0].path.iter().map(|relay| (&relay.fingerprint[..2], &*relay.nickname)).collect();
        assert_eq!(names, [("AA", "guard"), ("BB", "middle")]);
        let flood = format!("1 BUILT {} PURPOSE=GENERAL", [A; 100].join(","));
        let told = circuits(std::iter::repeat_n(&*flood, 1000));
        assert_eq!((told.len(), told[0].path.len()), (MAX_CIRCUITS, MAX_RELAYS));
    }

    #[test]
    fn address_and_country() {
        let entry =
            ["r moria1 lpXfw1/+uGEym58asExGOXAgzjE aBcD 2026-01-31 12:00:00 192.0.2.7 9001 0", "s Fast Running"];
        assert_eq!(address(entry.into_iter()), Some([192, 0, 2, 7].into()));
        assert_eq!(address(["r x", "r", ""].into_iter()), None);
        assert_eq!(country("DE").as_deref(), Some("de"));
        for none in ["??", "", "d", "deu", "d\u{1b}"] {
            assert_eq!(country(none), None, "{none:?}");
        }
    }
}
