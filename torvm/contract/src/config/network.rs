//! A Tor network of one's own.

use std::fmt;
use std::net::SocketAddrV4;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Fingerprint, List, Rejected};

/// Most authorities.
pub const MAX_AUTHORITIES: usize = 16;

/// Another network than the public one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Network {
    /// Its directory authorities. Tor refuses to start as `testing` without one.
    pub authorities: List<DirAuthority, MAX_AUTHORITIES>,
    /// Timing of a network for tests (`TestingTorNetwork`).
    pub testing: bool,
}

/// `[nickname] orport=PORT [no-v2] v3ident=FINGERPRINT IP:PORT FINGERPRINT` (torrc(5), `DirAuthority`); the last may be in groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DirAuthority {
    nickname: Option<String>,
    or_port: u16,
    v3_identity: Fingerprint,
    address: SocketAddrV4,
    fingerprint: Fingerprint,
}

impl FromStr for DirAuthority {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        let wrong = |problem: &str| Rejected::quoting(text, format!("is not a directory authority: {problem}"));
        let mut nickname = None;
        let (mut or_port, mut v3_identity, mut address) = (None, None, None);
        let mut words = words(text).ok_or_else(|| wrong("it is too long, or not of plain words"))?.peekable();
        if let Some(first) = words.next_if(|word| !word.contains(['=', ':', '.']) && *word != "no-v2") {
            if first.len() > 19 || !first.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                return Err(wrong("a nickname is 1 to 19 letters and digits"));
            }
            nickname = Some(first.to_owned());
        }
        for word in words.by_ref() {
            if let Some(port) = word.strip_prefix("orport=") {
                or_port =
                    Some(port.parse().ok().filter(|&port| port != 0).ok_or_else(|| wrong("its orport is no port"))?);
            } else if let Some(identity) = word.strip_prefix("v3ident=") {
                v3_identity = Some(identity.parse().map_err(|_: Rejected| wrong("its v3ident is no fingerprint"))?);
            } else if word != "no-v2" {
                address =
                    Some(word.parse().map_err(|_| wrong("use orport=, v3ident=, then IPv4:port and the fingerprint"))?);
                break;
            }
        }
        let fingerprint =
            words.collect::<String>().parse().map_err(|_: Rejected| wrong("its fingerprint is missing or wrong"))?;
        Ok(Self {
            nickname,
            or_port: or_port.ok_or_else(|| wrong("orport= is missing"))?,
            v3_identity: v3_identity.ok_or_else(|| wrong("v3ident= is missing"))?,
            address: address.ok_or_else(|| wrong("its address is missing"))?,
            fingerprint,
        })
    }
}

/// The words of a line, if it is short and of nothing but printable ASCII.
pub(super) fn words(text: &str) -> Option<impl Iterator<Item = &str>> {
    let plain = text.len() <= 1024 && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    plain.then(|| text.split(' ').filter(|word| !word.is_empty()))
}

impl fmt::Display for DirAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(nickname) = &self.nickname {
            write!(f, "{nickname} ")?;
        }
        write!(f, "orport={} v3ident={} {} {}", self.or_port, self.v3_identity, self.address, self.fingerprint)
    }
}

super::by_text!(DirAuthority);
