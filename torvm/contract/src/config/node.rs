//! Relays by country or fingerprint (torrc(5), `ExcludeNodes`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Rejected;

/// A relay's identity: 40 hexadecimal digits, kept in upper case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(String);

/// A country's two letters (ISO 3166), kept in lower case. The guest finds a relay's country in its GeoIP files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Country([u8; 2]);

/// Some relays: `{de}` or `$` and a fingerprint; the `$` may be missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Node {
    /// All in a country.
    Country(Country),
    /// One.
    Relay(Fingerprint),
}

impl FromStr for Fingerprint {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        let digits = text.strip_prefix('$').unwrap_or(text);
        if digits.len() == 40 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(Self(digits.to_ascii_uppercase()))
        } else {
            Err(Rejected::quoting(text, "is not a relay's fingerprint, which is 40 hexadecimal digits"))
        }
    }
}

impl FromStr for Country {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        match text.as_bytes() {
            [a, b] if a.is_ascii_alphabetic() && b.is_ascii_alphabetic() => {
                Ok(Self([a.to_ascii_lowercase(), b.to_ascii_lowercase()]))
            }
            _ => Err(Rejected::quoting(text, "is not a country's two letters, such as de")),
        }
    }
}

impl FromStr for Node {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        match text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some(country) => country.parse().map(Self::Country),
            None => text.parse().map(Self::Relay).map_err(|_: Rejected| {
                Rejected::quoting(text, "is neither a country, such as {de}, nor a relay's fingerprint")
            }),
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|&letter| write!(f, "{}", char::from(letter)))
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Country(country) => write!(f, "{{{country}}}"),
            Self::Relay(relay) => write!(f, "${relay}"),
        }
    }
}

super::by_text!(Fingerprint, Country, Node);
