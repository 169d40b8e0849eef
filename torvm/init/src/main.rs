//! PID 1 of the TorVM's guest. It sets up devices, firewall, network and state disk, starts Tor and stays to watch it. What fails before
//! Tor runs, and the end of Tor, power the guest off with the cause: half a guest is none.
//!
//! - [`boot`]: file systems, kernel modules, kernel settings
//! - [`channel`]: status lines to the host, orders from it
//! - [`config`]: what the host wants, by fw_cfg
//! - [`network`]: the two devices: names, addresses, routes, neighbours
//! - [`firewall`]: the ruleset
//! - [`disk`]: Tor's state
//! - [`tor`]: Tor's configuration, process and log
//! - [`button`]: the host's wish to power off
//! - [`watch`]: the loop that runs until the guest powers off
//! - [`program`]: helpers that are run and waited for
//! - [`lines`]: lines out of a stream, bounded
//! - [`error`]: what goes wrong
#![forbid(unsafe_code)]

mod boot;
mod button;
mod channel;
mod config;
mod disk;
mod error;
mod firewall;
mod lines;
mod network;
mod program;
mod tor;
mod watch;

use std::time::Duration;

use proxyvpn_torvm::channel::Status;
use rustix::system::{RebootCommand, reboot};

use crate::channel::Channel;
use crate::error::Error;
use crate::watch::Watch;

/// How long the last lines may take to the host.
const FAREWELL: Duration = Duration::from_millis(200);

fn main() {
    if std::process::id() != 1 {
        eprintln!("torvm-init: it is PID 1 of the TorVM's guest, and nothing else");
        std::process::exit(2);
    }
    let mut channel = Channel::closed();
    let cause = match start(&mut channel) {
        Ok(watch) => watch.run(&mut channel),
        Err(error) => error::chain(&error),
    };
    eprintln!("torvm-init: powers off: {cause}");
    channel.send(&Status::off(&cause));
    disk::unmount();
    channel.flush(FAREWELL);
    // It returns only when it fails; then the end of PID 1 is a panic, and that ends QEMU too.
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("torvm-init: power off: {error}");
    }
}

/// All up to the start of Tor.
fn start(channel: &mut Channel) -> Result<Watch, Error> {
    boot::mount()?;
    boot::load_modules()?;
    channel.open()?;
    channel.send(&Status::Init);
    boot::set_limits()?;
    let config = config::read()?;
    let button = button::open()?;
    network::name_devices()?;
    boot::set_kernel()?;
    firewall::apply(config.tor.udp())?;
    boot::lock_modules()?;
    network::configure()?;
    channel.send(&Status::Network);
    let (disk, room) = disk::mount(channel)?;
    channel.send(&Status::State { disk });
    if let Some(text) = room {
        channel.send(&Status::log("warn", &text));
    }
    let tor = tor::start(&config, channel)?;
    channel.send(&Status::Tor);
    Ok(Watch::new(tor, button))
}
