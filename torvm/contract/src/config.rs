//! What the guest is told at its start, by fw_cfg.

use serde::{Deserialize, Serialize};

/// Name of the file in fw_cfg (`/sys/firmware/qemu_fw_cfg/by_name/NAME/raw`).
pub const FW_CFG: &str = "opt/org.proxyvpn/config";
/// Bytes of the longest configuration.
pub const MAX_CONFIG: usize = 64 * 1024;
/// The pluggable transports obfs4 and meek_lite in the guest, only in the image's initramfs with transports (`ClientTransportPlugin … exec`).
/// Tor cannot start it under `Sandbox 1`.
pub const OBFS4PROXY: &str = "/usr/bin/obfs4proxy";

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuestConfig {
    /// Tor's hash of the control password (`HashedControlPassword`), made anew for each run.
    pub control_password: HashedPassword,
}

/// As `tor --hash-password` gives it: `16:` and 58 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HashedPassword(String);

/// What a value may not be, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejected(pub String);

impl TryFrom<String> for HashedPassword {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        let digits = text.strip_prefix("16:").unwrap_or_default();
        if digits.len() == 58 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(Self(text))
        } else {
            Err(Rejected("a hashed password is 16: and 58 hexadecimal digits".to_owned()))
        }
    }
}

impl From<HashedPassword> for String {
    fn from(password: HashedPassword) -> Self {
        password.0
    }
}

impl AsRef<str> for HashedPassword {
    fn as_ref(&self) -> &str {
        &self.0
    }
}
