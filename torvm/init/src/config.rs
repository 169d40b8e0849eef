//! What the host wants, by fw_cfg: there before anything is mounted, and only root reads it.

use std::fs::File;
use std::io::Read as _;

use proxyvpn_torvm::config::{FW_CFG, GuestConfig, MAX_CONFIG};

use crate::error::{Error, While as _};

/// Reads and checks it.
pub(crate) fn read() -> Result<GuestConfig, Error> {
    let path = format!("/sys/firmware/qemu_fw_cfg/by_name/{FW_CFG}/raw");
    let mut json = Vec::new();
    let limit = MAX_CONFIG as u64 + 1;
    File::open(&path).and_then(|file| file.take(limit).read_to_end(&mut json)).during("read the configuration")?;
    parse(&json)
}

fn parse(json: &[u8]) -> Result<GuestConfig, Error> {
    if json.len() > MAX_CONFIG {
        return Err(Error::Wrong(format!("the configuration is longer than {MAX_CONFIG} bytes")));
    }
    // serde_json names the place and the kind of the mistake; a secret value is a hash at most.
    serde_json::from_slice(json).map_err(|error| Error::Wrong(format!("the configuration is wrong: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_configuration_is_refused() {
        for json in ["", "{}", "[]", "\0", "{\"control-password\":\"x\"}", "{\"unknown\":1}"] {
            assert!(parse(json.as_bytes()).is_err(), "{json:?} was taken");
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let error = parse(&vec![b' '; MAX_CONFIG + 1]).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(error, Err(format!("the configuration is longer than {MAX_CONFIG} bytes")));
    }
}
