//! The virtual machine while it runs.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxyvpn_torvm::channel::{Order, Status};
use proxyvpn_torvm::config::GuestConfig;
use proxyvpn_torvm::launch::{Accelerator, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until, timeout};

use super::accel::{self, Acceleration};
use super::channel::Channel;
use super::launcher::Launcher;
use super::qmp::{Qmp, Told};
use super::{Error, Image, config, disk};
use crate::fdstore::Inherited;

/// How long the guest may say nothing: five heartbeats.
const HUNG_TIME: Duration = Duration::from_secs(10);
/// The same until its first heartbeat; emulated on a busy machine it needs half of it.
const BOOT_TIME: Duration = Duration::from_secs(60);
/// How long QEMU may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// How long the last words may take when the end is known.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long the launcher may take to end a QEMU that does not end by itself.
const KILL_TIME: Duration = Duration::from_secs(4);

/// What is started.
#[derive(Debug)]
pub struct Spec<'a> {
    /// What runs the guest's instructions; `None`: KVM where the guest runs under it, else TCG.
    pub accelerator: Option<Accelerator>,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// What the guest is told.
    pub config: GuestConfig,
    /// Directory of what stays: the state disk, and whether KVM works.
    pub state: &'a Path,
}

/// What happens to the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest tells how it is.
    Status(Status),
    /// It stands still or says nothing; why, for people. Told again while it lasts.
    Hung(String),
    /// It is gone; why, for people. Nothing comes after this.
    Ended(String),
}

/// How it went down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoweredDown {
    /// The guest powered off by itself, its file system is in order.
    Clean,
    /// It was ended, or ended otherwise; why, for people.
    Forced(String),
}

/// Descriptors by which a later process goes on with the virtual machine.
#[derive(Debug)]
pub struct Kept {
    launcher: OwnedFd,
    qmp: OwnedFd,
    channel: OwnedFd,
}

impl Kept {
    /// Names in the service manager's store.
    pub const NAMES: [&'static str; 3] = ["vm-launcher", "vm-qmp", "vm-channel"];

    /// From descriptors in the order of [`NAMES`](Self::NAMES).
    #[must_use]
    pub fn new([launcher, qmp, channel]: [OwnedFd; 3]) -> Self {
        Self { launcher, qmp, channel }
    }

    /// From what an earlier process left, if all of it is there.
    pub fn take(inherited: &mut Inherited) -> Option<Self> {
        let [launcher, qmp, channel] = Self::NAMES.map(|name| inherited.named(name));
        Some(Self::new([launcher?, qmp?, channel?]))
    }
}

/// A running virtual machine. When it is dropped, QEMU ends, unless [`kept`](Self::kept) descriptors are open elsewhere.
#[derive(Debug)]
pub struct Vm {
    launcher: Launcher,
    qmp: Qmp,
    channel: Channel,
    /// Told before anybody asked.
    early: VecDeque<Event>,
    patience: Patience,
    end: End,
}

/// How long to wait for the guest.
#[derive(Debug)]
struct Patience {
    /// When it last said something.
    heard: Instant,
    /// How long it may say nothing.
    limit: Duration,
    /// QEMU has been asked since then.
    asked: Option<Instant>,
}

/// What is known of the end.
#[derive(Debug, Default)]
struct End {
    /// The guest's last words.
    off: Option<String>,
    /// QEMU's reason.
    shutdown: Option<String>,
    panicked: bool,
    /// The launcher's words.
    cause: Option<String>,
    /// It ends, and this is how long last words are waited for.
    until: Option<Instant>,
    over: bool,
}

impl Vm {
    /// Starts it through the launcher at `socket`. `tap`: queue of the TAP device; `link`: the guest's end of its way out. Under
    /// KVM this waits until the guest has reported, and unless it must be KVM starts it anew without if it does not. When it is
    /// dropped half-way, QEMU ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn launch(
        socket: &Path,
        image: Image,
        spec: Spec<'_>,
        tap: BorrowedFd<'_>,
        link: OwnedFd,
    ) -> Result<(Self, Acceleration), Error> {
        let plugin = spec.config.tor.bridges().iter().any(|bridge| bridge.transport().plugin().is_some());
        let initramfs = if plugin { image.transports.as_ref().ok_or(Error::NoTransports)? } else { &image.initramfs };
        let (directory, record) = (spec.state.to_owned(), spec.state.join(accel::RECORD));
        let recalled = record.clone();
        let (disk, remembered) =
            blocking("open the state disk", move || Ok((disk::open(&directory)?, accel::Failure::recall(&recalled))))
                .await?;
        let config = config::file(&spec.config)?;
        let start = Start {
            socket,
            memory_mib: spec.memory_mib,
            tap,
            link: link.as_fd(),
            kernel: &image.kernel,
            initramfs,
            disk: &disk,
            config: &config,
        };

        let (accelerator, reason) = accel::first(spec.accelerator, remembered.as_ref());
        if accelerator == Accelerator::Tcg {
            let (vm, used) = start.run(accelerator, reason).await?;
            if remembered.is_some_and(|failure| failure.outdated(&used.qemu)) {
                blocking("forget that KVM failed", move || {
                    let _ = crate::record::remove(&record);
                    Ok(())
                })
                .await?;
            }
            return Ok((vm, used));
        }
        let (version, cause, silent) = match start.run(accelerator, reason).await {
            Ok((mut vm, used)) => match vm.prove().await {
                Ok(()) => return Ok((vm, used)),
                Err(cause) => {
                    // Two at a time would share devices and disk.
                    vm.force().await;
                    (used.qemu, cause, true)
                }
            },
            Err(Error::Failed { cause }) => (String::new(), cause, false),
            Err(error) => return Err(error),
        };
        if spec.accelerator == Some(Accelerator::Kvm) {
            return Err(Error::Kvm { cause });
        }
        tracing::warn!("the virtual machine does not start with KVM, it is emulated: {cause}");
        let started = start.run(Accelerator::Tcg, accel::fallback(&cause)).await?;
        // A refusal is quick, and need not be remembered: the device may appear.
        if silent {
            blocking("remember that KVM failed", move || {
                accel::Failure::new(&version, &cause).remember(&record);
                Ok(())
            })
            .await?;
        }
        Ok(started)
    }

    /// Goes on with one that an earlier process started; `None` when it has ended meanwhile.
    #[must_use]
    pub fn adopt(kept: Kept) -> Option<Self> {
        let adopted = Self::take_over(kept);
        if let Err(cause) = &adopted {
            tracing::info!("the virtual machine of an earlier daemon has ended: {cause}");
        }
        adopted.ok()
    }

    fn take_over(kept: Kept) -> Result<Self, String> {
        let told = |error: std::io::Error| error.to_string();
        rustix::io::ioctl_fionbio(&kept.launcher, true).map_err(|errno| errno.to_string())?;
        let launcher = Launcher::new(kept.launcher).map_err(told)?;
        launcher.running()?;
        // What the launcher said may have been read by an earlier process.
        let mut ends = [PollFd::new(&kept.qmp, PollFlags::empty())];
        if poll(&mut ends, Some(&Timespec::default())).is_ok_and(|hung_up| hung_up > 0) {
            return Err("QEMU has closed its connections".to_owned());
        }
        let qmp = Qmp::new(stream(kept.qmp.into()).map_err(told)?, true);
        let channel = Channel::new(stream(kept.channel.into()).map_err(told)?, true);
        Ok(Self::new(launcher, qmp, channel))
    }

    fn new(launcher: Launcher, qmp: Qmp, channel: Channel) -> Self {
        let patience = Patience { heard: Instant::now(), limit: BOOT_TIME, asked: None };
        Self { launcher, qmp, channel, early: VecDeque::new(), patience, end: End::default() }
    }

    /// What a later process needs to go on with it, under [`Kept::NAMES`].
    #[must_use]
    pub fn kept(&self) -> [(&'static str, BorrowedFd<'_>); 3] {
        let [launcher, qmp, channel] = Kept::NAMES;
        [(launcher, self.launcher.as_fd()), (qmp, self.qmp.as_fd()), (channel, self.channel.as_fd())]
    }

    /// Has the guest set its clock to the host's.
    ///
    /// # Errors
    /// When the guest has not read what it was told before.
    pub fn set_clock(&mut self) -> std::io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(std::io::Error::other)?;
        let unix_micros = u64::try_from(now.as_micros()).map_err(std::io::Error::other)?;
        self.channel.order(&Order::Clock { unix_micros })
    }

    /// What happens next. After [`Event::Ended`] nothing comes any more. Cancel safe.
    pub async fn event(&mut self) -> Event {
        loop {
            if let Some(event) = self.early.pop_front() {
                return event;
            }
            if self.end.over {
                return std::future::pending().await;
            }
            let words_left = !self.qmp.over() || !self.channel.over();
            if self.end.cause.is_some() && !words_left {
                return self.ended();
            }
            let deadline = self.deadline();
            tokio::select! {
                reply = self.launcher.recv(), if self.end.cause.is_none() => match reply {
                    Ok(Some(Reply::Ended { cause } | Reply::Failed { cause })) => self.ends(Some(cause)),
                    Ok(Some(Reply::Started { .. })) => {}
                    Ok(None) => self.ends(Some("QEMU's launcher ended without a word".to_owned())),
                    Err(error) => self.ends(Some(format!("the connection to QEMU's launcher broke: {error}"))),
                },
                told = self.qmp.next() => if let Some(event) = self.told(told) {
                    return event;
                },
                status = self.channel.next() => match status {
                    Some(status) => return self.heard(status),
                    None => self.ends(None),
                },
                () = sleep_until(deadline) => if let Some(event) = self.late() {
                    return event;
                },
            }
        }
    }

    fn told(&mut self, told: Told) -> Option<Event> {
        match told {
            Told::Shutdown(reason) => self.end.shutdown = Some(reason),
            Told::Panicked => {
                self.end.panicked = true;
                return Some(Event::Hung("the guest's kernel has panicked".to_owned()));
            }
            Told::Stopped if self.end.shutdown.is_none() => {
                return Some(Event::Hung("QEMU has stopped the guest".to_owned()));
            }
            Told::Stopped | Told::Resumed => {}
            Told::Status(status) if self.patience.asked.is_some() => {
                return Some(self.hung(&format!("QEMU answers that it is {status}")));
            }
            Told::Status(_) => {}
            Told::Over => self.ends(None),
        }
        None
    }

    fn heard(&mut self, status: Status) -> Event {
        self.patience.heard = Instant::now();
        self.patience.asked = None;
        match &status {
            Status::Alive => self.patience.limit = HUNG_TIME,
            Status::Off { cause } => self.end.off = Some(cause.clone()),
            _ => {}
        }
        Event::Status(status)
    }

    fn deadline(&self) -> Instant {
        let patience = &self.patience;
        self.end
            .until
            .unwrap_or_else(|| patience.asked.map_or(patience.heard + patience.limit, |asked| asked + ANSWER_TIME))
    }

    fn late(&mut self) -> Option<Event> {
        if self.end.until.is_some() {
            return Some(self.ended());
        }
        if self.patience.asked.is_some() {
            return Some(self.hung("QEMU does not answer either"));
        }
        self.qmp.ask_status();
        self.patience.asked = Some(Instant::now());
        None
    }

    fn hung(&mut self, qemu: &str) -> Event {
        let seconds = self.patience.limit.as_secs();
        self.patience.heard = Instant::now();
        self.patience.asked = None;
        Event::Hung(format!("the guest has said nothing for {seconds} s; {qemu}"))
    }

    fn ends(&mut self, cause: Option<String>) {
        self.end.cause = self.end.cause.take().or(cause);
        self.end.until.get_or_insert(Instant::now() + LAST_WORDS);
    }

    fn ended(&mut self) -> Event {
        self.end.over = true;
        Event::Ended(self.end.words())
    }

    /// Waits until the guest has reported, or says why it will not.
    async fn prove(&mut self) -> Result<(), String> {
        let reported = timeout(accel::PROOF_TIME, async {
            match self.event().await {
                Event::Status(status) => Ok(status),
                Event::Hung(cause) | Event::Ended(cause) => Err(cause),
            }
        });
        let silence = |_| format!("the guest did not report within {} s", accel::PROOF_TIME.as_secs());
        let status = reported.await.map_err(silence)??;
        self.early.push_front(Event::Status(status));
        Ok(())
    }

    /// Presses the power button, and waits up to `limit` until the guest has powered off. One that does not is ended.
    pub async fn power_down(mut self, limit: Duration) -> PoweredDown {
        self.early.clear();
        self.qmp.power_down();
        if timeout(limit, self.wait_end()).await.is_err() {
            self.force().await;
            return PoweredDown::Forced(format!("the guest did not power off within {} s", limit.as_secs()));
        }
        if self.end.clean() { PoweredDown::Clean } else { PoweredDown::Forced(self.end.words()) }
    }

    /// Ends it, and waits until it is gone.
    async fn force(&mut self) {
        self.qmp.quit();
        if timeout(ANSWER_TIME, self.wait_end()).await.is_err() {
            self.launcher.end();
            self.end.until = Some(Instant::now() + KILL_TIME);
            self.wait_end().await;
            if !self.qmp.over() {
                tracing::warn!("QEMU does not end");
            }
        }
    }

    async fn wait_end(&mut self) {
        while !self.end.over {
            if let Event::Ended(_) = self.event().await {
                return;
            }
        }
    }
}

impl End {
    fn clean(&self) -> bool {
        !self.panicked && (self.off.is_some() || self.shutdown.as_deref() == Some("guest-shutdown"))
    }

    fn words(&self) -> String {
        match self {
            Self { panicked: true, .. } => self.because("the guest's kernel has panicked"),
            Self { off: Some(cause), .. } => format!("the guest powered off: {cause}"),
            Self { shutdown: Some(reason), .. } if reason == "guest-panic" => {
                self.because("the guest's kernel has panicked")
            }
            Self { shutdown: Some(reason), .. } if reason == "guest-reset" => {
                self.because("the guest started anew, as after a panic of its kernel")
            }
            Self { cause: Some(cause), .. } => cause.clone(),
            _ => "QEMU has closed its connections".to_owned(),
        }
    }

    /// With the launcher's words, in which the kernel's are.
    fn because(&self, what: &str) -> String {
        self.cause.as_ref().map_or(what.to_owned(), |cause| format!("{what}; {cause}"))
    }
}

/// What each attempt needs.
struct Start<'a> {
    socket: &'a Path,
    memory_mib: u32,
    tap: BorrowedFd<'a>,
    link: BorrowedFd<'a>,
    kernel: &'a OwnedFd,
    initramfs: &'a OwnedFd,
    disk: &'a std::fs::File,
    config: &'a std::fs::File,
}

impl Start<'_> {
    async fn run(&self, accelerator: Accelerator, reason: String) -> Result<(Vm, Acceleration), Error> {
        let failed = |source| Error::Prepare { operation: "make its sockets", source };
        let (qmp, its_qmp) = StdStream::pair().map_err(failed)?;
        let (channel, its_channel) = StdStream::pair().map_err(failed)?;
        let request = Request { accelerator, memory_mib: self.memory_mib };
        let descriptors = [
            self.tap,
            self.link,
            its_qmp.as_fd(),
            its_channel.as_fd(),
            self.kernel.as_fd(),
            self.initramfs.as_fd(),
            self.disk.as_fd(),
            self.config.as_fd(),
        ];
        let (launcher, version) = Launcher::start(self.socket, &request, descriptors).await?;
        let acceleration = Acceleration { accelerator, reason, qemu: version };
        let qmp = Qmp::new(stream(qmp).map_err(failed)?, false);
        let channel = Channel::new(stream(channel).map_err(failed)?, false);
        Ok((Vm::new(launcher, qmp, channel), acceleration))
    }
}

fn stream(stream: StdStream) -> std::io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Prepare { operation, source: error.into() })?
}
