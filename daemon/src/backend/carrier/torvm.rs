//! What is different where a virtual machine with Tor carries the traffic: its phases, and its end.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits, Link};
use proxyvpn_engine::upstream::Upstream;
use proxyvpn_torvm::launch::Accelerator;
use proxyvpn_torvm::link;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::{Carrier, EVENTS, internal};
use crate::backend::guest::{Guest, News};
use crate::backend::{network, resolved, told};
use crate::config::profile::{Scheme, TorVmSpec};
use crate::fdstore::Inherited;
use crate::machine::{Failure, Request};
use crate::net::Stage;
use crate::record;
use crate::resolvers::{Origin, Resolvers};
use crate::tor::{Password, hint};
use crate::vm::{self, Image, PoweredDown, Vm};

/// Tor is waited for as long as it gets on. When nothing changes for so long, all is made anew.
const STALLED: Duration = Duration::from_secs(600);
/// What a virtual machine has to stop Tor and to unmount its disk.
const POWER_DOWN: Duration = Duration::from_secs(5);
/// Connections to relays that a guest may have; a Tor client has some ten.
const FLOWS: usize = 1024;
/// Bytes that they may hold.
const MEMORY: usize = 64 << 20;
/// The launcher tells of QEMU's end about when its way out is closed.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Name of the packet engine's end of the virtual machine's way out, where descriptors outlive the process.
const LINK: &str = "vm-link";
/// Record of the virtual machine that runs, beside the record of what is wanted.
const RECORD: &str = "torvm.json";

/// Where the parts of the virtual machine are.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Records and the state disk.
    pub state: PathBuf,
    /// Records until the next boot.
    pub runtime: PathBuf,
    /// Kernel, initramfs and manifest.
    pub image: PathBuf,
    /// The launcher's socket.
    pub launcher: PathBuf,
}

/// What an earlier daemon left of its virtual machine.
#[derive(Debug)]
pub struct Left {
    /// The machine.
    pub vm: vm::Kept,
    /// The packet engine's end of its way out.
    pub link: OwnedFd,
}

impl Left {
    /// Picks it out of what was kept.
    pub fn take(inherited: &mut Inherited) -> Option<Self> {
        let (vm, link) = (vm::Kept::take(inherited), inherited.named(LINK));
        Some(Self { vm: vm?, link: link? })
    }
}

/// What the next daemon must know about the virtual machine that runs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Running {
    password: Password,
    accelerator: Accelerator,
    why: String,
}

impl Carrier {
    /// What can be checked of the virtual machine without changing anything.
    pub(super) async fn check_image(&mut self) -> Result<(), Failure> {
        if self.left.is_some() {
            return Ok(());
        }
        let image = Image::open(&self.paths.image).await;
        self.image = Some(image.map_err(|error| Failure::from_error(ReasonCode::ImageInvalid, &error))?);
        Ok(())
    }

    /// Looks up what the guest is told, and narrows what it can reach down to that.
    pub(super) async fn tell(&mut self, request: &Request) -> Result<(), Failure> {
        let spec = spec(request)?;
        let failed = |error: &(dyn std::error::Error + 'static)| Failure::from_error(ReasonCode::VmFailed, error);
        let password = Password::generate().map_err(|error| failed(&error))?;
        let control_password = password.hashed().map_err(|error| failed(&error))?;
        let resolvers = self.resolvers.as_ref().map(|found| found.for_lookup().to_vec()).unwrap_or_default();
        let config = told::find(spec, control_password, &resolvers).await?;
        let mut connector = (*self.connector()?).clone();
        let on_link = self.network().await?.on_link().await.map_err(|error| network::failure(&error))?;
        told::restrict(&mut connector, &config, on_link);
        // A name may lead to this machine.
        if let (Upstream::HttpConnect(proxy), Some(desired)) = (&connector.upstream, &mut self.desired) {
            desired.exceptions.services.clone_from(&proxy.addresses);
        }
        self.connector = Some(Arc::new(connector));
        self.told = Some((password, config));
        Ok(())
    }

    pub(super) async fn create_tap(&mut self) -> Result<(), Failure> {
        let tunnel = self.tunnel()?;
        let made = self.network().await?.create_tunnel(&tunnel, 1).await;
        self.tap = made.map_err(|error| network::failure(&error))?;
        self.held.clear();
        Ok(())
    }

    /// Goes on with the virtual machine of the daemon before, or starts one.
    pub(super) async fn launch_vm(&mut self, request: &Request) -> Result<(), Failure> {
        if let Some(ending) = self.ending.take() {
            // What is asked for is its end, however it came.
            let _ = ending.await;
        }
        // A virtual machine that is gone on with has its own.
        let told = self.told.take();
        if let Some(left) = self.left.take()
            && self.go_on(left, request).await
        {
            return Ok(());
        }
        let spec = spec(request)?;
        // Not yet checked where there was a virtual machine to go on with.
        if self.image.is_none() {
            self.check_image().await?;
        }
        let (password, config) = told.ok_or_else(|| internal("the phases are out of order"))?;
        let image = self.image.take().ok_or_else(|| internal("the phases are out of order"))?;
        let failed = |error: &(dyn std::error::Error + 'static)| Failure::from_error(ReasonCode::VmFailed, error);
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(|error| failed(&error))?;
        let tap = self.tap.first().ok_or_else(|| internal("the phases are out of order"))?;
        let state = &self.paths.state;
        let wanted = vm::Spec { accelerator: spec.accel, memory_mib: spec.memory_mib, config, state };
        let vm = Vm::launch(&self.paths.launcher, image, wanted, tap.as_fd(), theirs).await;
        let (vm, used) = vm.map_err(|error| failed(&error))?;
        let running = Running { password, accelerator: used.accelerator, why: used.reason };
        self.leave(&vm, &ours, &running);
        self.take_on(vm, running, ours, request).await
    }

    /// The virtual machine that carries the traffic from now on.
    async fn take_on(&mut self, vm: Vm, running: Running, link: OwnedFd, request: &Request) -> Result<(), Failure> {
        let Running { password, accelerator, why } = running;
        self.accelerator = (accelerator_name(accelerator), why);
        self.guest = Some(Guest::new(vm, password.clone(), way(request), self.bootstrap.clone()));
        self.tor.set(Some(password));
        self.carry(link, spec(request)?.tor.udp()).await
    }

    /// Leaves the virtual machine to a later daemon. Without that it ends with this one.
    fn leave(&self, vm: &Vm, link: &OwnedFd, running: &Running) {
        let Some(store) = &self.store else { return };
        let recorded = serde_json::to_vec(running).map_err(std::io::Error::other);
        let kept = recorded.and_then(|bytes| record::write(&self.paths.runtime.join(RECORD), &bytes)).and_then(|()| {
            vm.kept().into_iter().try_for_each(|(name, fd)| store.keep(name, fd))?;
            store.keep(LINK, link.as_fd())
        });
        if let Err(error) = kept {
            tracing::warn!(%error, "the virtual machine will end with the daemon");
            self.forget_vm();
        }
    }

    fn forget_vm(&self) {
        let Some(store) = &self.store else { return };
        for name in vm::Kept::NAMES.into_iter().chain([LINK]) {
            if let Err(error) = store.forget(name) {
                tracing::warn!(%error, "what belongs to the virtual machine is kept although it is not needed");
            }
        }
        if let Err(error) = record::remove(&self.paths.runtime.join(RECORD)) {
            tracing::warn!(%error, "the record of the virtual machine can't be removed");
        }
    }

    /// Whether the virtual machine of the daemon before runs and is known, so that it is gone on with.
    async fn go_on(&mut self, left: Left, request: &Request) -> bool {
        let record = record::read(&self.paths.runtime.join(RECORD)).ok().flatten();
        let running = record.and_then(|bytes| serde_json::from_slice::<Running>(&bytes).ok());
        let vm = Vm::adopt(left.vm);
        let (Some(running), Some(vm)) = (running, vm) else {
            tracing::info!("the virtual machine of the daemon before can't be gone on with; it is started anew");
            self.forget_vm();
            return false;
        };
        if let Err(failure) = self.take_on(vm, running, left.link, request).await {
            tracing::warn!("{}", failure.text);
            self.end_vm();
            return false;
        }
        true
    }

    /// Starts the packet engine on the virtual machine's way out, with or without the guest's UDP.
    async fn carry(&mut self, fd: OwnedFd, udp: bool) -> Result<(), Failure> {
        let connector = self.connector()?;
        let (sender, events) = mpsc::channel(EVENTS);
        let limits = Limits { flows: FLOWS, pending: FLOWS / 4, memory: MEMORY.min(self.limits.memory), ..self.limits };
        let config = Config { mtu: link::UPLINK_MTU, limits, connector, owners: None };
        let guest = Link {
            guest: link::UPLINK_GUEST,
            gateway: link::UPLINK_GATEWAY,
            guest_mac: link::UPLINK_GUEST_MAC,
            gateway_mac: link::UPLINK_GATEWAY_MAC,
            udp,
        };
        let engine = Engine::start_link(fd, guest, config, sender)
            .map_err(|error| Failure::from_error(ReasonCode::EngineFailed, &error))?;
        self.engine.put(engine).await;
        self.events = Some(events);
        Ok(())
    }

    /// Waits until the virtual machine takes traffic.
    pub(super) async fn wait_tap(&mut self) -> Result<(), Failure> {
        self.guest_is(Guest::has_network).await
    }

    /// Waits until the guest has come so far, with an eye on what happens around.
    async fn guest_is(&mut self, there: fn(&Guest) -> bool) -> Result<(), Failure> {
        loop {
            let guest = self.guest.as_mut().ok_or_else(|| internal("the phases are out of order"))?;
            if there(guest) {
                return Ok(());
            }
            let stalled = guest.changed() + STALLED;
            tokio::select! {
                news = guest.next() => match news {
                    News::Network | News::Progress => {}
                    News::Down(failure) => return Err(failure),
                },
                what = self.lookout.next() => self.attend(what).await,
                () = sleep_until(stalled) => {
                    let hint = self.bootstrap.borrow().hint.clone();
                    return Err(Failure::new(ReasonCode::TorStalled, format!("Tor gets no further. {hint}")));
                }
            }
        }
    }

    pub(super) async fn configure_tap(&mut self) -> Result<(), Failure> {
        self.watch().await;
        self.apply(Stage::Firewall).await?;
        self.applied = true;
        self.apply(Stage::Routes).await?;
        let desired = self.desired()?;
        self.network().await?.end_older(&desired).await;
        let device = desired.tunnel.as_ref().map(|tunnel| tunnel.name.clone()).unwrap_or_default();
        self.in_force = Some(desired);
        let configured = resolved::configure(&self.bus, &device, link::GUEST.into()).await;
        self.dns_told = Some(configured.unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "systemd-resolved does not ask Tor");
            false
        }));
        Ok(())
    }

    /// The way out of a virtual machine ends with it. What itself says about its end is the cause.
    pub(super) async fn last_words(&mut self) -> Option<Failure> {
        let guest = self.guest.as_mut()?;
        let down = async {
            loop {
                if let News::Down(failure) = guest.next().await {
                    return failure;
                }
            }
        };
        timeout(LAST_WORDS, down).await.ok()
    }

    pub(super) async fn wait_bootstrap(&mut self) -> Result<(), Failure> {
        if let Some(guest) = &mut self.guest {
            guest.reachable();
        }
        self.guest_is(Guest::is_ready).await
    }

    /// Has the virtual machine power off, if there is one. That takes its time, beside everything else.
    pub(super) fn end_vm(&mut self) {
        self.forget_vm();
        self.tor.set(None);
        self.image = None;
        self.told = None;
        self.dns_told = None;
        self.accelerator = Default::default();
        self.tap.clear();
        let left = self.left.take().and_then(|left| Vm::adopt(left.vm)).map(|vm| (vm, true));
        let Some((vm, able)) = self.guest.take().map(Guest::into_vm).or(left) else { return };
        let before = self.ending.take();
        self.ending = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            let limit = if able { POWER_DOWN } else { Duration::ZERO };
            if let PoweredDown::Forced(cause) = vm.power_down(limit).await
                && able
            {
                tracing::warn!("the virtual machine did not power off by itself: {cause}");
            }
        }));
    }
}

/// What keeps names from being looked up through Tor, as far as it is known.
pub(super) fn names(found: &Resolvers, dns_told: Option<bool>) -> Option<String> {
    let listed = if found.origin == Origin::ResolvConf { found.addresses.as_slice() } else { &[] };
    resolved::warning(&[listed, &found.local].concat(), dns_told.unwrap_or(true))
}

/// What Tor's troubles can come from.
fn way(request: &Request) -> hint::Way {
    let torvm = request.profile.torvm.as_ref();
    hint::Way {
        bridges: torvm.is_some_and(|torvm| !torvm.tor.bridges().is_empty()),
        snowflake: torvm.is_some_and(|torvm| torvm.tor.udp()),
        proxy: request.profile.upstream.scheme != Scheme::Direct || torvm.is_some_and(|torvm| torvm.proxy.is_some()),
    }
}

fn spec(request: &Request) -> Result<&TorVmSpec, Failure> {
    request.profile.torvm.as_ref().ok_or_else(|| internal("a profile without [torvm]"))
}

/// As on the bus.
const fn accelerator_name(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    }
}
