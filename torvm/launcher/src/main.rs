//! `proxyvpn-qemu`: starts the TorVM's QEMU with its descriptors and nothing else, and ends it when nobody wants it any more.
//!
//! - [`receive`]: the daemon's request, one packet with descriptors
//! - [`check`]: what each descriptor has to be
//! - [`program`]: which QEMU is started
//! - [`command`]: its command line
//! - [`run`]: one QEMU, from the request to its end
//! - [`console`]: hostile text made fit for a journal
//! - [`filter`]: system calls that nobody here needs
//! - [`listen`], [`isolate`]: what systemd does, for machines without it
//! - [`sys`]: system calls without a safe interface

mod check;
mod command;
mod console;
mod filter;
mod isolate;
mod listen;
mod program;
mod receive;
mod run;
mod sys;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use clap::{Parser, ValueEnum};

use isolate::Identity;

/// Starts the TorVM's QEMU for proxyvpnd: without rights, and with nothing but the descriptors that come over a socket.
///
/// Without --listen it serves one connection, which is its standard input, and counts on systemd to have isolated it.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Start this program instead of the distribution's QEMU; it has to belong to root
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Without systemd: listen here, and isolate each QEMU. Needs root
    #[arg(long, value_name = "PATH", requires = "owner", requires = "user")]
    listen: Option<PathBuf>,
    /// With --listen: who may connect beside root
    #[arg(long, value_name = "USER", requires = "listen")]
    owner: Option<String>,
    /// With --listen: who QEMU runs as
    #[arg(long, value_name = "USER", requires = "listen")]
    user: Option<String>,
    /// How --listen starts this program for a connection
    #[arg(long, hide = true, requires = "uid", requires = "gid", conflicts_with = "listen")]
    stage: Option<Stage>,
    #[arg(long, hide = true, requires = "stage")]
    uid: Option<u32>,
    #[arg(long, hide = true, requires = "stage")]
    gid: Option<u32>,
}

/// The steps of isolation, each a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// New namespaces; starts the next.
    Separate,
    /// The first process of the new namespaces.
    Confine,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Separate => "separate",
            Self::Confine => "confine",
        }
    }
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("proxyvpn-qemu: {}", run::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> Result<bool, Box<dyn std::error::Error>> {
    let qemu = args.qemu.as_deref();
    if let (Some(path), Some(owner), Some(user)) = (&args.listen, &args.owner, &args.user) {
        listen::forever(path, owner, user, qemu)?;
    }
    let connection = take_connection()?;
    if let (Some(stage), Some(user), Some(group)) = (args.stage, args.uid, args.gid) {
        match isolate(stage, Identity { user, group }, &connection, qemu) {
            Ok(None) => {}
            Ok(Some(served)) => return Ok(served),
            Err(error) => {
                run::refuse(&connection, run::chain(error.as_ref()));
                return Ok(false);
            }
        }
    }
    Ok(run::serve(connection, qemu))
}

/// One step of isolation. `None`: this process is isolated; else another one has served the connection, successfully or not.
fn isolate(
    stage: Stage,
    identity: Identity,
    connection: &OwnedFd,
    qemu: Option<&Path>,
) -> Result<Option<bool>, Box<dyn std::error::Error>> {
    match stage {
        Stage::Confine => isolate::confine(identity).map(|()| None).map_err(Into::into),
        Stage::Separate => {
            isolate::separate()?;
            let mut next = listen::staged(Stage::Confine, identity, qemu);
            let status = next.stdin(Stdio::from(connection.try_clone()?)).status()?;
            Ok(Some(status.success()))
        }
    }
}

/// Standard input, which is then empty.
fn take_connection() -> io::Result<OwnedFd> {
    let connection = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_manual_page_has_every_option_and_no_other() {
        let page = include_str!("../../../docs/man/proxyvpn-qemu.8");
        let told = page.lines().filter_map(|line| line.strip_prefix(".It Fl -")?.split(' ').next());
        let command = Args::command();
        let known: Vec<&str> =
            command.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(clap::Arg::get_long).collect();
        assert_eq!(told.collect::<Vec<_>>(), known);
    }
}
