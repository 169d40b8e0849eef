//! A proxy that Tor itself goes through.

use std::fmt;
use std::net::SocketAddrV4;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Rejected;

/// Bytes of the longest user name and password (RFC 1929; Tor takes 512 bytes for both together).
pub const MAX_LOGIN: usize = 255;

/// Where it is and who we are there. An address: the guest can't look up a name on its way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Proxy {
    /// What it speaks.
    pub kind: Kind,
    /// Where it is. The guest's way out is IPv4.
    pub address: SocketAddrV4,
    /// Who we are.
    #[serde(default)]
    pub login: Option<Login>,
}

/// What a proxy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// HTTP CONNECT (`HTTPSProxy`).
    Https,
    /// SOCKS 5 (`Socks5Proxy`).
    Socks5,
}

/// User and password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Login {
    /// Without a colon, which would end it in HTTP's Basic authentication (RFC 7617).
    pub user: User,
    /// Any line of text.
    pub password: Secret,
}

/// 1 to [`MAX_LOGIN`] bytes of UTF-8 without colon and control characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User(String);

/// 1 to [`MAX_LOGIN`] bytes of UTF-8 without control characters, which are not printed and are wiped from memory.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Secret(Zeroizing<String>);

fn line(text: &str) -> bool {
    (1..=MAX_LOGIN).contains(&text.len()) && !text.chars().any(char::is_control)
}

impl TryFrom<String> for User {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        if line(&text) && !text.contains(':') {
            return Ok(Self(text));
        }
        Err(Rejected(format!("a proxy's user name is 1 to {MAX_LOGIN} bytes without colon and control characters")))
    }
}

impl TryFrom<String> for Secret {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        let text = Zeroizing::new(text);
        if line(&text) {
            return Ok(Self(text));
        }
        Err(Rejected(format!("a proxy's password is 1 to {MAX_LOGIN} bytes without control characters")))
    }
}

impl From<User> for String {
    fn from(user: User) -> Self {
        user.0
    }
}

impl AsRef<str> for User {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Secret {
    /// The password, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Only the guest's configuration is ever serialized, into memory that goes to the guest.
impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
