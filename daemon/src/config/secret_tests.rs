#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::pipe;

use super::*;
use crate::test_dir::TestDir;

fn own() -> Vec<u32> {
    vec![0, geteuid().as_raw()]
}

fn write(path: &Path, bytes: &[u8], mode: u32) {
    // The one before may be read-only.
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn one_newline_is_dropped_and_nothing_else() {
    for (bytes, want) in [
        (&b"hunter2"[..], Ok("hunter2")),
        (b"hunter2\n", Ok("hunter2")),
        (b"hunter2\r\n", Ok("hunter2")),
        (b" hunter2 \n", Ok(" hunter2 ")),
        ("grün\n".as_bytes(), Ok("grün")),
        (b"hunter2\n\n", Err("not one line")),
        (b"hunter2\nmore", Err("not one line")),
        (b"hunter\0", Err("not one line")),
        (b"hunter2\xff", Err("not one line")),
        (b"", Err("is empty")),
        (b"\n", Err("is empty")),
    ] {
        match (secret(bytes, "f"), want) {
            (Ok(got), Ok(want)) => assert_eq!(got.expose(), want),
            (Err(error), Err(says)) => {
                assert!(error.to_string().contains(says), "{bytes:?}: {error}");
                assert!(!error.to_string().contains("hunter"));
            }
            (got, want) => assert_eq!(format!("{got:?}"), format!("{want:?}"), "{bytes:?}"),
        }
    }
}

#[test]
fn a_file_is_read_only_when_nobody_else_could_read_or_write_it() {
    let dir = TestDir::new("secret");
    let path = dir.path("password");
    for (mode, says) in [
        (0o600, None),
        (0o640, None),
        (0o400, None),
        (0o644, Some("chmod o= ")),
        (0o604, Some("chmod o= ")),
        (0o601, Some("chmod o= ")),
        (0o660, Some("chmod go-w ")),
    ] {
        write(&path, b"hunter2\n", mode);
        match (read_file(&path, &own()), says) {
            (Ok(secret), None) => assert_eq!(secret.expose(), "hunter2"),
            (Err(error), Some(says)) => assert!(error.to_string().contains(says), "{mode:o}: {error}"),
            (got, want) => assert_eq!(format!("{got:?}"), format!("{want:?}"), "{mode:o}"),
        }
    }
}

#[test]
fn what_is_no_small_plain_file_of_ours_is_refused() {
    let dir = TestDir::new("secret");
    let path = dir.path("password");
    write(&path, b"hunter2", 0o600);
    let link = dir.path("link");
    symlink(&path, &link).unwrap();
    let fifo = dir.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    let says = |path: &Path, owners: &[u32]| read_file(path, owners).unwrap_err().to_string();
    assert!(says(&link, &own()).contains("is a symbolic link"));
    assert!(says(&fifo, &own()).contains("is not a regular file"));
    assert!(says(&dir.path(""), &own()).contains("is not a regular file"));
    assert!(says(&dir.path("none"), &own()).contains("does not exist"));
    assert!(says(&path, &[geteuid().as_raw() + 1]).contains("chown"));
    write(&path, &[b'x'; MAX_SECRET], 0o600);
    assert_eq!(read_file(&path, &own()).unwrap().expose().len(), MAX_SECRET);
    write(&path, &[b'x'; MAX_SECRET + 1], 0o600);
    assert!(says(&path, &own()).contains("larger than 4096"));
}

#[test]
fn a_credential_is_a_file_in_systemds_directory() {
    let dir = TestDir::new("secret");
    write(&dir.path("proxy"), b"hunter2", 0o400);
    let directory = Some(dir.path("").into_os_string());
    assert_eq!(read_credential("proxy", directory.clone(), &own()).unwrap().expose(), "hunter2");
    for name in ["../proxy", "a/b", "", ".", "..", "a:b", "a b", "a\n"] {
        let error = read_credential(name, directory.clone(), &own()).unwrap_err();
        assert!(matches!(error, SecretError::Name(_)), "{name:?}: {error}");
    }
    let error = read_credential("proxy", None, &own()).unwrap_err().to_string();
    assert!(error.contains("LoadCredential=proxy:"), "{error}");
}

#[tokio::test]
async fn a_descriptor_gives_a_password_of_one_line() {
    let memfd = |bytes: &[u8]| {
        let mut memfd = File::from(memfd_create("password", MemfdFlags::CLOEXEC).unwrap());
        memfd.write_all(bytes).unwrap();
        OwnedFd::from(memfd)
    };
    assert_eq!(read_fd(memfd(b"hunter2\n")).await.unwrap().expose(), "hunter2", "read from its start");
    let (read, write) = pipe().unwrap();
    rustix::io::write(&write, b"hunter2").unwrap();
    drop(write);
    assert_eq!(read_fd(read).await.unwrap().expose(), "hunter2");
    assert!(matches!(read_fd(memfd(b"\n")).await, Err(SecretError::Empty { .. })));
    let long = read_fd(memfd(&[b'x'; MAX_SECRET + 1])).await;
    assert!(matches!(long, Err(SecretError::Descriptor(DescriptorError::TooLong { .. }))));
}

#[tokio::test]
async fn an_endless_or_mute_descriptor_ends_in_time() {
    let begin = Instant::now();
    let (endless, write) = pipe().unwrap();
    let writer = std::thread::spawn(move || while rustix::io::write(&write, &[b'x'; 512]).is_ok() {});
    assert!(matches!(read_fd(endless).await, Err(SecretError::Descriptor(DescriptorError::TooLong { .. }))));
    writer.join().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(read_fd(socket.into()).await, Err(SecretError::Descriptor(DescriptorError::Kind))));
    let (_read, write_only) = pipe().unwrap();
    assert!(read_fd(write_only).await.is_err());
    assert!(begin.elapsed() < descriptor::TIMEOUT + Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[test]
fn a_password_of_a_caller_is_not_kept() {
    let error = read(&PasswordSource::Caller).unwrap_err().to_string();
    assert!(error.contains("connect again"), "{error}");
}
