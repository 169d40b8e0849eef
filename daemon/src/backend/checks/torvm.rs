//! What a virtual machine with Tor needs.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use rustix::fs::{Access, access};

use super::Report;
use crate::backend::carrier::Paths;
use crate::machine::failure::chain;
use crate::vm::Image;

/// The image, and the way to QEMU. Nothing is started.
pub(super) async fn checks(report: &mut Report, paths: &Paths) {
    match Image::open(&paths.image).await {
        Ok(_) => report.ok("torvm-image", format!("The virtual machine's image in {} is whole", paths.image.display())),
        Err(error) => {
            report.failed("torvm-image", chain(&error), "build it (scripts/build-torvm-image.sh) and install it again");
        }
    }
    let socket = paths.launcher.display();
    match listens(&paths.launcher) {
        Ok(()) => report.ok("qemu-launcher", format!("QEMU's launcher can be asked at {socket}")),
        Err(error) => report.failed(
            "qemu-launcher",
            format!("QEMU's launcher can't be asked at {socket}: {error}"),
            "systemctl enable --now proxyvpn-qemu.socket; without systemd start proxyvpn-qemu --listen as root",
        ),
    }
}

fn listens(socket: &Path) -> io::Result<()> {
    if !socket.metadata()?.file_type().is_socket() {
        return Err(io::ErrorKind::NotConnected.into());
    }
    Ok(access(socket, Access::WRITE_OK)?)
}
