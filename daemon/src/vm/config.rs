//! The guest's configuration as a file in memory that nobody can change any more.

use std::fs::File;
use std::io::{self, Write as _};

use proxyvpn_torvm::config::GuestConfig;
use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::Error;

/// Writes it as JSON and seals it (memfd_create(2)). QEMU's user may read it; the descriptor is the only way to it.
pub(super) fn file(config: &GuestConfig) -> Result<File, Error> {
    make(config).map_err(|source| Error::Prepare { operation: "pass the guest its configuration", source })
}

fn make(config: &GuestConfig) -> io::Result<File> {
    // A proxy's password may stand in it.
    let text = Zeroizing::new(config.to_bytes().map_err(io::Error::other)?);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match memfd_create("torvm-config", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(Errno::INVAL) => memfd_create("torvm-config", flags)?,
        made => made?,
    };
    let mut file = File::from(fd);
    file.write_all(&text)?;
    // QEMU has another user, and opens the descriptor anew.
    fchmod(&file, Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Seek as _;

    use super::*;
    use crate::tor::Password;

    #[test]
    fn it_is_whole_and_stays_so() {
        let config = super::super::tests::config(&Password::generate().unwrap());
        let mut file = file(&config).unwrap();
        file.rewind().unwrap();
        let read: GuestConfig = serde_json::from_reader(&file).unwrap();
        assert_eq!(read, config);
        assert!(file.set_len(0).is_err() && file.write_all(b"x").is_err());
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&file.metadata().unwrap()) & 0o777, 0o444);
    }
}
