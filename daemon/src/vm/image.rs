//! The image: kernel and initramfs, and a manifest that says what they are. What is started is the very file that was checked.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::fstat;
use rustix::process::geteuid;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::Error;
use crate::config::file::{self, FileError, Rules};

/// The manifest's name.
const MANIFEST: &str = "manifest.json";
/// A manifest lists some dozen packages.
const MAX_MANIFEST: usize = 256 * 1024;
/// What an older or newer daemon does not understand has another number.
const VERSION: u32 = 1;

/// An image whose files are what its manifest says. Its descriptors are open, and were checked themselves.
#[derive(Debug)]
pub struct Image {
    pub(super) kernel: OwnedFd,
    pub(super) initramfs: OwnedFd,
    /// The initramfs with pluggable transports.
    pub(super) transports: Option<OwnedFd>,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// See docs/torvm.md.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    #[serde(rename = "version")]
    _version: u32,
    kernel: Entry,
    initramfs: Entry,
    #[serde(default)]
    transports: Option<Entry>,
    /// What the files were made of, for people.
    #[serde(rename = "packages", default)]
    _packages: Vec<Package>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    file: String,
    sha256: String,
    size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Package {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "version")]
    _version: String,
    #[serde(rename = "sha256", default)]
    _sha256: String,
}

impl Image {
    /// Opens the image in `directory` and compares every byte with the manifest, on a thread of its own. Directory and files must
    /// belong to root or the daemon's user, and nobody else may be able to write them.
    ///
    /// # Errors
    /// When there is none, or it can't be trusted.
    pub async fn open(directory: &Path) -> Result<Self, Error> {
        let directory = directory.to_owned();
        let opening = tokio::task::spawn_blocking(move || Self::read(&directory, &[0, geteuid().as_raw()]));
        opening.await.map_err(|error| Error::Prepare { operation: "read the image", source: error.into() })?
    }

    fn read(directory: &Path, owners: &[u32]) -> Result<Self, Error> {
        let missing = |error| match error {
            FileError::Missing { .. } => Error::NoImage { directory: directory.into() },
            other => Error::Image(other),
        };
        let dir = file::open_dir(directory).map_err(missing)?;
        file::check_dir(dir.as_fd(), directory, owners).map_err(Error::Image)?;
        let path = directory.join(MANIFEST);
        let rules = Rules { owners, max: MAX_MANIFEST, secret: false };
        let manifest = file::read_at(dir.as_fd(), OsStr::new(MANIFEST), &path, rules).map_err(missing)?;
        let manifest = Manifest::parse(&manifest).map_err(|problem| Error::Manifest { path, problem })?;
        let open = |entry: &Entry| entry.open(dir.as_fd(), directory, owners);
        Ok(Self {
            kernel: open(&manifest.kernel)?,
            initramfs: open(&manifest.initramfs)?,
            transports: manifest.transports.as_ref().map(open).transpose()?,
        })
    }
}

impl Manifest {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let Version { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!("its version is {version}, not {VERSION}"));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        for entry in [&manifest.kernel, &manifest.initramfs].into_iter().chain(&manifest.transports) {
            let name = Path::new(&entry.file);
            if name.file_name() != Some(name.as_os_str()) || entry.file.contains('\0') {
                return Err(format!("{:?} is not the name of a file", entry.file));
            }
            if entry.sha256.len() != 64 || !entry.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(format!("the sha256 of {} is not one", entry.file));
            }
        }
        Ok(manifest)
    }
}

impl Entry {
    fn open(&self, dir: BorrowedFd<'_>, directory: &Path, owners: &[u32]) -> Result<OwnedFd, Error> {
        let path = directory.join(&self.file);
        let rules = Rules { owners, max: 0, secret: false };
        let mut file = file::open_at(dir, OsStr::new(&self.file), &path, rules).map_err(Error::Image)?;
        let failed = |path: &PathBuf, source| Error::Image(FileError::Read { path: path.clone(), source });
        let stat = fstat(&file).map_err(|errno| failed(&path, errno.into()))?;
        // QEMU has another user, and opens the descriptor anew.
        if stat.st_mode & 0o004 == 0 {
            return Err(Error::Unreadable { path });
        }
        if u64::try_from(stat.st_size) != Ok(self.size) {
            return Err(Error::Altered { path, problem: "its size differs" });
        }
        let sum = hash(&mut file, self.size).map_err(|source| failed(&path, source))?;
        if !sum.eq_ignore_ascii_case(&self.sha256) {
            return Err(Error::Altered { path, problem: "its SHA-256 differs" });
        }
        Ok(file.into())
    }
}

/// SHA-256 of the file's first `size` bytes, and of one more if there is one.
fn hash(file: &mut File, size: u64) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    let mut file = file.take(size.saturating_add(1));
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::test_dir::TestDir;

    /// An image of two small files.
    pub(in super::super) fn image(name: &str) -> TestDir {
        let dir = TestDir::new(name);
        fs::set_permissions(dir.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        write(&dir, "vmlinuz", b"kernel");
        write(&dir, "initramfs", b"initramfs");
        write(&dir, MANIFEST, manifest().as_bytes());
        dir
    }

    fn manifest() -> String {
        let sum = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!(
            r#"{{"version":1,"kernel":{{"file":"vmlinuz","sha256":"{}","size":6}},"initramfs":{{"file":"initramfs","sha256":"{}","size":9}},
                "packages":[{{"name":"tor","version":"0.4.9.11-1","sha256":"00"}}]}}"#,
            sum(b"kernel"),
            sum(b"initramfs")
        )
    }

    fn write(dir: &TestDir, name: &str, bytes: &[u8]) {
        fs::write(dir.path(name), bytes).unwrap();
        fs::set_permissions(dir.path(name), fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn read(dir: &TestDir) -> Result<Image, Error> {
        Image::read(&dir.path(""), &[geteuid().as_raw()])
    }

    fn told(error: &Error) -> String {
        std::error::Error::source(error).map_or(error.to_string(), |source| format!("{error}: {source}"))
    }

    #[tokio::test]
    async fn a_good_image_is_opened_at_its_checked_files() {
        let dir = image("image");
        let image = Image::open(&dir.path("")).await.unwrap();
        // Another file in its place later changes nothing.
        fs::remove_file(dir.path("vmlinuz")).unwrap();
        write(&dir, "vmlinuz", b"hacked");
        let mut text = String::new();
        let mut kernel = File::from(image.kernel);
        io::Seek::rewind(&mut kernel).unwrap();
        kernel.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kernel");
        assert!(image.transports.is_none());
    }

    #[test]
    fn whatever_is_wrong_is_refused_and_told() {
        type Break = fn(&TestDir);
        let cases: [(&str, Break, &str); 13] = [
            ("none", |dir| fs::remove_file(dir.path(MANIFEST)).unwrap(), "build-torvm-image.sh"),
            ("altered", |dir| write(dir, "vmlinuz", b"kernem"), "SHA-256 differs"),
            ("longer", |dir| write(dir, "initramfs", b"initramfs!"), "its size differs"),
            ("lost", |dir| fs::remove_file(dir.path("vmlinuz")).unwrap(), "vmlinuz does not exist"),
            (
                "link",
                |dir| {
                    fs::rename(dir.path("vmlinuz"), dir.path("other")).unwrap();
                    symlink("other", dir.path("vmlinuz")).unwrap();
                },
                "symbolic link",
            ),
            (
                "writable",
                |dir| fs::set_permissions(dir.path("vmlinuz"), fs::Permissions::from_mode(0o664)).unwrap(),
                "written by others",
            ),
            (
                "open",
                |dir| fs::set_permissions(dir.path(""), fs::Permissions::from_mode(0o777)).unwrap(),
                "written by others",
            ),
            (
                "private",
                |dir| fs::set_permissions(dir.path("vmlinuz"), fs::Permissions::from_mode(0o600)).unwrap(),
                "chmod a+r",
            ),
            ("newer", |dir| write(dir, MANIFEST, br#"{"version":2,"else":1}"#), "version is 2, not 1"),
            (
                "unknown",
                |dir| write(dir, MANIFEST, manifest().replace("\"packages\"", "\"boxes\"").as_bytes()),
                "unknown field `boxes`",
            ),
            (
                "path",
                |dir| write(dir, MANIFEST, manifest().replace("\"vmlinuz\"", "\"../vmlinuz\"").as_bytes()),
                "is not the name of a file",
            ),
            (
                "sum",
                |dir| {
                    write(dir, MANIFEST, br#"{"version":1,"kernel":{"file":"vmlinuz","sha256":"0","size":6},"initramfs":{"file":"i","sha256":"","size":0}}"#)
                },
                "sha256 of vmlinuz",
            ),
            ("large", |dir| write(dir, MANIFEST, &vec![b' '; MAX_MANIFEST + 1]), "is larger than"),
        ];
        for (name, harm, words) in cases {
            let dir = image(&format!("image-{name}"));
            harm(&dir);
            let told = told(&read(&dir).unwrap_err());
            assert!(told.contains(words), "{name}: {told}");
        }
        let dir = image("image-owner");
        let told = told(&Image::read(&dir.path(""), &[geteuid().as_raw() + 1]).unwrap_err());
        assert!(told.contains("belongs to user id"), "{told}");
        let told = Image::read(&dir.path("nowhere"), &[0]).unwrap_err().to_string();
        assert!(told.contains("build-torvm-image.sh"), "{told}");
    }
}
