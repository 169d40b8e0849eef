//! The virtual machine with Tor in it, while it runs.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::{Bootstrap, Circuit, Relay};
use proxyvpn_torvm::channel::{Disk, Status};
use proxyvpn_torvm::link::{CONTROL_PORT, GUEST};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::machine::Failure;
use crate::tor::{self, Control, NewIdentity, Password, hint};
use crate::vm::{self, Vm};

/// Where Tor is controlled.
pub(super) const CONTROL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(GUEST), CONTROL_PORT);
/// Tor opens its port some moments after its start.
const AGAIN: Duration = Duration::from_millis(300);
/// A virtual machine that runs, and whose Tor can't be asked for so long, is of no use.
const UNREACHABLE: Duration = Duration::from_secs(60);
/// Without any change for so long, a hint is given.
const SLOW: Duration = Duration::from_secs(20);
/// So many certificates of another time, and no progress, are the clock's fault: one authority may be wrong.
const UNTIMELY: u32 = 3;

/// See the module.
pub(super) struct Guest {
    vm: Vm,
    password: Password,
    /// Said by the guest.
    network: bool,
    /// It is of no use any more.
    down: bool,
    control: Option<Control>,
    connecting: Option<JoinHandle<Result<Control, tor::Error>>>,
    /// When Tor's port is tried next; `None` before there is a way to it.
    try_at: Option<Instant>,
    /// Since when Tor can't be asked.
    lost_since: Option<Instant>,
    /// What Tor said last.
    progress: tor::Bootstrap,
    changed: Instant,
    /// Seconds by which Tor finds the clock wrong.
    skew: Option<i64>,
    /// Certificates of another time since Tor last got further, and the hint for them.
    untimely: (u32, &'static str),
    way: hint::Way,
    shown: watch::Sender<Bootstrap>,
}

/// What happened.
#[derive(Debug)]
pub(super) enum News {
    /// Traffic may come.
    Network,
    /// Tor is further, or says what is in its way.
    Progress,
    /// It is of no use any more.
    Down(Failure),
}

impl Guest {
    /// A virtual machine that was started, or that an earlier daemon left. `shown` gets how far Tor is.
    pub(super) fn new(vm: Vm, password: Password, way: hint::Way, shown: watch::Sender<Bootstrap>) -> Self {
        let _ = shown.send_replace(Bootstrap::default());
        Self {
            vm,
            password,
            network: false,
            down: false,
            control: None,
            connecting: None,
            try_at: None,
            lost_since: None,
            progress: tor::Bootstrap::default(),
            changed: Instant::now(),
            skew: None,
            untimely: (0, ""),
            way,
            shown,
        }
    }

    /// The guest has said that traffic may come.
    pub(super) const fn has_network(&self) -> bool {
        self.network
    }

    /// From now on there is a way to Tor's control port.
    pub(super) fn reachable(&mut self) {
        self.try_at.get_or_insert_with(Instant::now);
        self.lost_since.get_or_insert_with(Instant::now);
    }

    /// Tor can carry traffic.
    pub(super) const fn is_ready(&self) -> bool {
        self.progress.percent >= 100
    }

    /// When anything last changed.
    pub(super) const fn changed(&self) -> Instant {
        self.changed
    }

    /// The machine slept, or its clock was set.
    pub(super) fn set_clock(&mut self) {
        if let Err(error) = self.vm.set_clock() {
            tracing::warn!(%error, "the virtual machine's clock was not set");
        }
    }

    /// Gives the virtual machine back, to be ended, and whether it can do that by itself.
    pub(super) fn into_vm(self) -> (Vm, bool) {
        self.shown.send_replace(Bootstrap::default());
        if let Some(connecting) = self.connecting {
            connecting.abort();
        }
        (self.vm, !self.down)
    }

    /// Waits for something to happen. May be dropped while it waits.
    pub(super) async fn next(&mut self) -> News {
        let news = self.what_is_next().await;
        self.down |= matches!(news, News::Down(_));
        news
    }

    async fn what_is_next(&mut self) -> News {
        loop {
            let slow = (!self.is_ready() && self.try_at.is_some()).then(|| self.changed + SLOW);
            let (try_at, lost) = (self.try_at, self.lost_since.map(|since| since + UNREACHABLE));
            let Self { vm, control, connecting, .. } = self;
            let idle = control.is_none() && connecting.is_none();
            tokio::select! {
                event = vm.event() => {
                    if let Some(news) = self.of_vm(event) {
                        return news;
                    }
                }
                event = next_of(control) => {
                    if let Some(news) = self.of_tor(event) {
                        return news;
                    }
                }
                connected = joined(connecting) => {
                    self.connecting = None;
                    if let Some(news) = self.connected(connected).await {
                        return news;
                    }
                }
                () = until(try_at), if idle => {
                    let password = self.password.clone();
                    self.connecting = Some(tokio::spawn(async move { Control::connect(CONTROL, &password).await }));
                }
                () = until(lost) => {
                    self.lost_since = None;
                    return News::Down(failure(ReasonCode::VmFailed, "Tor in the virtual machine does not answer"));
                }
                () = until(slow), if self.shown.borrow().hint.is_empty() && slow.is_some() => self.show(),
            }
        }
    }

    async fn connected(&mut self, connected: Result<Control, tor::Error>) -> Option<News> {
        let asked = match connected {
            Ok(mut control) => control.bootstrap().await.map(|progress| (control, progress)),
            Err(error) => Err(error),
        };
        match asked {
            Ok((control, progress)) => {
                self.control = Some(control);
                self.lost_since = None;
                self.progressed(progress);
                Some(News::Progress)
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "Tor can't be asked yet");
                self.try_at = Some(Instant::now() + AGAIN);
                self.lost_since.get_or_insert_with(Instant::now);
                None
            }
        }
    }

    fn of_tor(&mut self, event: tor::Event) -> Option<News> {
        match event {
            tor::Event::Bootstrap(progress) => {
                self.progressed(progress);
                Some(News::Progress)
            }
            tor::Event::ClockSkew { seconds, .. } => {
                self.skew = Some(seconds);
                self.show();
                Some(News::Progress)
            }
            tor::Event::Closed(cause) => {
                tracing::warn!("the connection to Tor's control port ended: {cause}");
                self.control = None;
                self.try_at = Some(Instant::now() + AGAIN);
                self.lost_since = Some(Instant::now());
                None
            }
            _ => None,
        }
    }

    fn of_vm(&mut self, event: vm::Event) -> Option<News> {
        match event {
            // An earlier daemon may have heard the first one.
            vm::Event::Status(Status::Network | Status::Alive) if !self.network => {
                self.network = true;
                Some(News::Network)
            }
            vm::Event::Status(Status::Log { level, text }) => {
                match level.as_str() {
                    "err" => tracing::error!(target: "torvm", "{text}"),
                    "warn" => tracing::warn!(target: "torvm", "{text}"),
                    _ => tracing::info!(target: "torvm", "{text}"),
                }
                let hint = hint::of_certificate(&text)?;
                self.untimely = (self.untimely.0.saturating_add(1), hint);
                self.show();
                Some(News::Progress)
            }
            vm::Event::Status(Status::State { disk: Disk::Reset }) => {
                tracing::warn!(target: "torvm", "the state disk was broken and is made anew: Tor chooses other guards");
                None
            }
            vm::Event::Status(Status::Off { cause }) => {
                Some(News::Down(failure(ReasonCode::VmFailed, &format!("The virtual machine gave up ({cause})"))))
            }
            vm::Event::Status(_) => None,
            vm::Event::Hung(cause) => {
                Some(News::Down(failure(ReasonCode::VmHung, &format!("The virtual machine hangs ({cause})"))))
            }
            vm::Event::Ended(cause) => {
                Some(News::Down(failure(ReasonCode::VmFailed, &format!("The virtual machine ended ({cause})"))))
            }
        }
    }

    fn progressed(&mut self, progress: tor::Bootstrap) {
        if progress != self.progress {
            self.changed = Instant::now();
        }
        if progress.percent > self.progress.percent {
            self.untimely.0 = 0;
        }
        self.progress = progress;
        self.show();
    }

    fn show(&self) {
        let slow = self.changed.elapsed() >= SLOW;
        let progress = &self.progress;
        let hint = if self.is_ready() {
            String::new()
        } else if self.untimely.0 >= UNTIMELY {
            self.untimely.1.to_owned()
        } else if slow || self.skew.is_some() || progress.recommendation == "warn" {
            hint::hint(progress, self.skew, self.way)
        } else {
            String::new()
        };
        self.shown.send_if_modified(|shown| {
            let now = Bootstrap {
                percent: progress.percent.into(),
                tag: progress.tag.clone(),
                summary: progress.summary.clone(),
                warning: progress.warning.clone(),
                reason: progress.reason.clone(),
                hint,
            };
            let changed = *shown != now;
            *shown = now;
            changed
        });
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("progress", &self.progress).finish_non_exhaustive()
    }
}

async fn next_of(control: &mut Option<Control>) -> tor::Event {
    match control {
        Some(control) => control.next().await,
        None => std::future::pending().await,
    }
}

async fn joined(connecting: &mut Option<JoinHandle<Result<Control, tor::Error>>>) -> Result<Control, tor::Error> {
    match connecting {
        // A panic in there is no answer.
        Some(task) => match task.await {
            Ok(connected) => connected,
            Err(_) => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

fn failure(code: ReasonCode, text: &str) -> Failure {
    Failure::new(code, format!("{text}; it is started anew"))
}

/// How Tor is asked beside the states, while it runs.
#[derive(Debug, Clone, Default)]
pub(super) struct TorSlot(Arc<Mutex<Option<Password>>>);

impl TorSlot {
    /// Tor runs, or it does not.
    pub(super) fn set(&self, password: Option<Password>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = password;
    }

    async fn control(&self) -> Result<Control, Failure> {
        let password = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(password) = password else {
            return Err(Failure::new(
                ReasonCode::NotSupported,
                "Tor does not run: connect a profile with backend = \"torvm\" first",
            ));
        };
        Control::connect(CONTROL, &password).await.map_err(|error| Failure::from_error(ReasonCode::VmFailed, &error))
    }

    /// Has connections from now on take other ways.
    pub(super) async fn new_identity(&self) -> Result<(), Failure> {
        let asked = self.control().await?.new_identity().await;
        match asked.map_err(|error| Failure::from_error(ReasonCode::VmFailed, &error))? {
            NewIdentity::Now => {}
            NewIdentity::Within(time) => {
                tracing::info!(target: "torvm", "Tor gives a new identity within {} s: the last one is young", time.as_secs());
            }
        }
        Ok(())
    }

    /// The ways through the Tor network.
    pub(super) async fn circuits(&self) -> Result<Vec<Circuit>, Failure> {
        let asked = self.control().await?.circuits().await;
        let circuits = asked.map_err(|error| Failure::from_error(ReasonCode::VmFailed, &error))?;
        let relay = |relay: tor::Relay| Relay {
            fingerprint: relay.fingerprint,
            nickname: relay.nickname,
            address: relay.address.map(|address| address.to_string()).unwrap_or_default(),
        };
        let circuit = |circuit: tor::Circuit| Circuit {
            id: circuit.id.to_string(),
            purpose: circuit.purpose,
            relays: circuit.path.into_iter().map(relay).collect(),
        };
        Ok(circuits.into_iter().map(circuit).collect())
    }
}
