//! The password of the control port. Tor is only given its hash.

use std::fmt;
use std::io;

use proxyvpn_engine::secret::Secret;
use proxyvpn_torvm::config::{HashedPassword, Rejected};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};

/// Bytes of the password; it is their hexadecimal digits.
const BYTES: usize = 32;
/// The iterated and salted S2K of RFC 2440 section 3.6.1.3 as Tor has it: the count's octet, and what it says.
const INDICATOR: u8 = 0x60;
const COUNT: usize = (16 + (INDICATOR as usize & 15)) << ((INDICATOR >> 4) + 6);

/// 256 random bits as hexadecimal digits. Can't be printed; is serialised in clear, for a record that only the daemon can read.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Password(Secret);

impl Password {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn generate() -> io::Result<Self> {
        Ok(Self(Secret::new(hex(&random::<BYTES>()?))))
    }

    /// For `HashedControlPassword`, with a new salt each time (control-spec 5.1, `tor --hash-password`).
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn hashed(&self) -> io::Result<HashedPassword> {
        HashedPassword::try_from(self.hash(random()?)).map_err(io::Error::other)
    }

    /// For `AUTHENTICATE`.
    #[must_use]
    pub fn secret(&self) -> &str {
        self.0.expose()
    }

    fn hash(&self, salt: [u8; 8]) -> String {
        let mut piece = salt.to_vec();
        piece.extend_from_slice(self.secret().as_bytes());
        let mut hash = Sha1::new();
        let mut left = COUNT;
        while left > 0 {
            let take = left.min(piece.len());
            hash.update(&piece[..take]);
            left -= take;
        }
        zeroize::Zeroize::zeroize(&mut piece);
        format!("16:{}{INDICATOR:02X}{}", hex(&salt), hex(&hash.finalize()))
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

impl TryFrom<String> for Password {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        let secret = Secret::new(text);
        let fits = secret.expose().len() == 2 * BYTES && secret.expose().bytes().all(|byte| byte.is_ascii_hexdigit());
        if fits {
            Ok(Self(secret))
        } else {
            Err(Rejected(format!("a control password is {} hexadecimal digits", 2 * BYTES)))
        }
    }
}

impl From<Password> for String {
    fn from(password: Password) -> Self {
        password.secret().to_owned()
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Up to 256 bytes come whole (getrandom(2)).
    if getrandom(&mut bytes, GetRandomFlags::empty())? == N {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_one_that_tor_makes() {
        // tor --hash-password with this password; the salt is the first 8 bytes.
        let password = Password(Secret::new("foo".to_owned()));
        let salt = [0xD1, 0x05, 0xAF, 0x64, 0x01, 0xF6, 0x6E, 0x85];
        assert_eq!(password.hash(salt), "16:D105AF6401F66E85601E2AFBFC0DED20295069F2A5A550154F24D31B22");
    }

    #[test]
    fn each_is_another_and_a_record_brings_it_back() {
        let password = Password::generate().unwrap();
        assert_ne!(password.secret(), Password::generate().unwrap().secret());
        assert_ne!(password.hashed().unwrap(), password.hashed().unwrap());
        let record = serde_json::to_string(&password).unwrap();
        assert_eq!(serde_json::from_str::<Password>(&record).unwrap().secret(), password.secret());
        for bad in ["\"\"", "\"00\"", &record.replace('"', "\"\\n")] {
            assert!(serde_json::from_str::<Password>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn it_cannot_be_printed() {
        let password = Password::generate().unwrap();
        assert_eq!(format!("{password:?}"), "Password(…)");
    }
}
