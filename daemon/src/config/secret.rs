//! Passwords: from a file, a systemd credential or a descriptor that came over the bus. They are only ever held in buffers
//! that are wiped.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use proxyvpn_engine::secret::Secret;
use rustix::process::geteuid;

use super::descriptor::{self, DescriptorError};
use super::error::Rejected;
use super::file::{self, FileError, Rules};
use super::profile::PasswordSource;

/// Longest password in bytes, with its newline.
pub const MAX_SECRET: usize = 4096;

/// Why there is no password. No message has any part of it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be had or must not be trusted.
    #[error(transparent)]
    File(#[from] FileError),
    /// The unit passes no credentials at all.
    #[error("systemd passed no credentials to the daemon; add LoadCredential={name}:/path to proxyvpnd.service")]
    NoCredentials {
        /// Name in the profile.
        name: String,
    },
    /// The name is not one that systemd allows.
    #[error(transparent)]
    Name(#[from] Rejected),
    /// Nothing in it.
    #[error("the password from {origin} is empty")]
    Empty {
        /// Where it came from.
        origin: String,
    },
    /// Over the bound.
    #[error("the password from {origin} is longer than {MAX_SECRET} bytes")]
    TooLong {
        /// Where it came from.
        origin: String,
    },
    /// Not what HTTP Basic authentication can send (RFC 7617 section 2).
    #[error("the password from {origin} is not one line of UTF-8 text")]
    NotText {
        /// Where it came from.
        origin: String,
    },
    /// The call that brought it was to another daemon process.
    #[error(
        "the password came with the call that connected, and a daemon that starts again does not have it; \
         run `proxyctl disconnect`, then connect again"
    )]
    Gone,
    /// The caller's descriptor gives nothing.
    #[error("cannot read the password from the caller's descriptor")]
    Descriptor(#[source] DescriptorError),
}

/// Reads the password anew from where the profile says. Blocks for a file's reading.
///
/// # Errors
/// See [`SecretError`].
pub fn read(source: &PasswordSource) -> Result<Secret, SecretError> {
    match source {
        PasswordSource::File(path) => read_file(path, &[0, geteuid().as_raw()]),
        PasswordSource::Credential(name) => {
            read_credential(name, std::env::var_os("CREDENTIALS_DIRECTORY"), &[0, geteuid().as_raw()])
        }
        PasswordSource::Caller => Err(SecretError::Gone),
    }
}

/// The rules for a credential's name, as systemd has them (`credential_name_valid`: a file name, and no `:`).
pub(super) fn credential_name(name: &str) -> Result<(), Rejected> {
    let fits = (1..=255).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:".contains(&b))
        && ![".", ".."].contains(&name);
    if fits { Ok(()) } else { Err(Rejected::new(format!("\"{name}\" cannot be the name of a systemd credential"))) }
}

fn read_credential(name: &str, directory: Option<OsString>, owners: &[u32]) -> Result<Secret, SecretError> {
    credential_name(name)?;
    let directory = directory.ok_or_else(|| SecretError::NoCredentials { name: name.to_owned() })?;
    read_file(&PathBuf::from(directory).join(name), owners)
}

fn read_file(path: &Path, owners: &[u32]) -> Result<Secret, SecretError> {
    let bytes = file::read(path, Rules { owners, max: MAX_SECRET, secret: true })?;
    secret(&bytes, &path.to_string_lossy())
}

/// Reads a password from a descriptor of a bus caller, to its end, within two seconds.
///
/// # Errors
/// See [`SecretError`].
pub async fn read_fd(fd: OwnedFd) -> Result<Secret, SecretError> {
    let bytes = descriptor::read(fd, MAX_SECRET).await.map_err(SecretError::Descriptor)?;
    secret(&bytes, "the caller")
}

/// One line of text; its newline is dropped.
fn secret(bytes: &[u8], origin: &str) -> Result<Secret, SecretError> {
    let origin = || origin.to_owned();
    let line = bytes.strip_suffix(b"\n").map_or(bytes, |line| line.strip_suffix(b"\r").unwrap_or(line));
    let text = std::str::from_utf8(line).map_err(|_| SecretError::NotText { origin: origin() })?;
    if text.is_empty() {
        return Err(SecretError::Empty { origin: origin() });
    }
    if text.chars().any(char::is_control) {
        return Err(SecretError::NotText { origin: origin() });
    }
    Ok(Secret::new(text.to_owned()))
}

#[cfg(test)]
#[path = "secret_tests.rs"]
mod tests;
