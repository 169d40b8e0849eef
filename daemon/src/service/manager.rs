//! `org.proxyvpn1.Manager`. The doc comments go into the introspection; `docs/dbus.md` says more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::names::{action, profile_path};
use proxyvpn_dbus::options::status;
use proxyvpn_dbus::types::{Check, Flow, HealthItem, LogRecord, PlanStep, Progress, Reason, State};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, ObjectServer, OwnedObjectPath, OwnedVariant, Variant};

use super::followers::Followers;
use super::options::{self, ConnectOptions};
use super::profiles::Profiles;
use super::publish;
use crate::authority::Authority;
use crate::config::store::{Importer, MAX_TEXT, ProfileStore};
use crate::config::{check, descriptor, secret};
use crate::log::Log;
use crate::machine::{Command, Handle, Request};

/// How long the machine may take to accept a command.
pub(super) const ACCEPT: Duration = Duration::from_secs(30);
/// How long looking ahead may take: names are resolved and the proxy is probed.
const EXAMINE: Duration = Duration::from_secs(120);
/// Most callers who look ahead at the same time: each opens sockets and asks the proxy.
pub(super) const EXAMINERS: usize = 8;
/// How long counters may take: the reading of properties waits for them.
const COUNT: Duration = Duration::from_secs(2);
/// Longest profile name (`check::profile_name`).
const MAX_NAME: usize = 64;

/// The object at `/org/proxyvpn1`.
#[derive(Debug)]
pub(super) struct Manager {
    pub(super) handle: Handle,
    pub(super) authority: Arc<Authority>,
    pub(super) profiles: Arc<Profiles>,
    pub(super) log: Log,
    pub(super) followers: Followers,
    /// Free places for those who look ahead.
    pub(super) examiners: Semaphore,
}

impl Manager {
    async fn tell<T>(&self, limit: Duration, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        tell(&self.handle, limit, command).await
    }

    /// Authorises what the arguments ask for and makes a request of them. `None`: they name nothing.
    async fn request(
        &self,
        name: &str,
        options: HashMap<String, OwnedVariant>,
        header: &Header<'_>,
    ) -> Result<Option<(Request, bool)>, Error> {
        short(name)?;
        // What is wrong in the caller's own words can be said without asking anybody.
        let mut options = ConnectOptions::parse(options)?;
        if !name.is_empty() && self.authority.check_read(header).await.is_ok() {
            // So that nobody types a password for a profile that is not there.
            self.load(name).await?;
        }
        let needed = if options.given() { action::CONNECT_ADHOC } else { action::CONNECT };
        let details = HashMap::from([("profile", name)]);
        self.authority.check(header, needed, &details).await?;
        if options.opens_lan() {
            self.authority.check(header, action::ALLOW_LAN, &details).await?;
        }
        if name.is_empty() && !options.given() {
            return Ok(None);
        }
        let base = if name.is_empty() { None } else { Some(self.load(name).await?) };
        let password = match options.take_password() {
            Some(fd) => Some(secret::read_fd(fd).await.map_err(|error| bad_option("password", &error))?),
            None => None,
        };
        let given_password = password.is_some();
        let verbose = options.verbose();
        let profile = tokio::task::spawn_blocking(move || options.apply(base, given_password))
            .await
            .map_err(|error| Error::Internal(format!("the options cannot be checked: {error}")))??;
        Ok(Some((Request { profile, password }, verbose)))
    }

    /// A place among those who look ahead.
    fn place(&self) -> Result<SemaphorePermit<'_>, Error> {
        self.examiners.try_acquire().map_err(|_| {
            Error::LimitExceeded(format!("{EXAMINERS} plans and checks are being made already; try again in a moment"))
        })
    }

    async fn load(&self, name: &str) -> Result<crate::config::profile::Profile, Error> {
        let name = name.to_owned();
        self.profiles.with_store(move |store| store.get(&name)).await
    }
}

/// Gives the machine a command and waits for its answer, which comes at once unless it looks ahead.
pub(super) async fn tell<T>(
    handle: &Handle,
    limit: Duration,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, Error> {
    let (sender, receiver) = oneshot::channel();
    let ended = || Error::Internal("the daemon is about to end; try again in a moment".to_owned());
    handle.commands.try_send(command(sender)).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => {
            Error::LimitExceeded("too many calls wait for the connection; try again in a moment".to_owned())
        }
        mpsc::error::TrySendError::Closed(_) => ended(),
    })?;
    match tokio::time::timeout(limit, receiver).await {
        Ok(answer) => answer.map_err(|_| ended()),
        Err(_) => Err(Error::Internal(format!("no answer within {} s; `proxyctl logs` may say why", limit.as_secs()))),
    }
}

/// An error with its causes, for an option.
fn bad_option(key: &str, error: &dyn std::error::Error) -> Error {
    let mut text = format!("option {key}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Error::InvalidOption(text)
}

pub(super) fn short(name: &str) -> Result<(), Error> {
    if name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(Error::LimitExceeded(format!("a profile's name has at most {MAX_NAME} bytes")))
}

fn nameless() -> Error {
    Error::InvalidOption(
        "give the name of a profile, or the option proxy-url with your proxy: http://host:port".to_owned(),
    )
}

/// The control of the machine's connection.
#[zbus::interface(name = "org.proxyvpn1.Manager")]
impl Manager {
    /// Starts a connection; returns when accepted.
    async fn connect(
        &self,
        profile: &str,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Error> {
        let (request, verbose) = self.request(profile, options, &header).await?.ok_or_else(nameless)?;
        // Before the connection begins; `publish` ends it with the connection.
        let before = self.log.set_verbose(verbose);
        let accepted = self.tell(ACCEPT, |reply| Command::Connect(Box::new(request), reply)).await;
        let accepted = accepted.and_then(|answer| answer);
        if accepted.is_err() {
            self.log.set_verbose(before);
        }
        accepted
    }

    /// Ends the connection; returns when accepted.
    async fn disconnect(&self, options: HashMap<String, OwnedVariant>) -> Result<(), Error> {
        options::none(&options)?;
        self.tell(ACCEPT, Command::Disconnect).await?
    }

    /// Makes the present connection anew without opening the network.
    async fn reconnect(&self) -> Result<(), Error> {
        self.tell(ACCEPT, Command::Reconnect).await?
    }

    /// Everything about the present state in one reply.
    async fn status(&self) -> Result<HashMap<String, OwnedVariant>, Error> {
        let view = self.handle.view.borrow().clone();
        let mut values: HashMap<&str, Variant<'_>> =
            publish::PROPERTIES.into_iter().map(|(name, read)| (name, read(&view))).collect();
        values.insert("Version", self.version().into());
        values.insert("Statistics", self.statistics().await.into());
        if view.backend == "torvm" {
            values.extend(publish::TORVM_PROPERTIES.into_iter().map(|(name, read)| (name, read(&view))));
        }
        values.insert(status::FIREWALL, view.firewall.into());
        values.insert(status::UPSTREAM, view.upstream.into());
        values.insert(status::DEVICE, view.device.into());
        values.insert(status::RESOLVERS, view.resolvers.into());
        let owned = values.into_iter().map(|(name, value)| Ok((name.to_owned(), OwnedVariant::try_from(value)?)));
        owned.collect::<zbus::Result<_>>().map_err(Error::ZBus)
    }

    /// What `Connect` with these arguments would change.
    async fn plan(
        &self,
        profile: &str,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<PlanStep>, Error> {
        let (request, _) = self.request(profile, options, &header).await?.ok_or_else(nameless)?;
        let _place = self.place()?;
        self.tell(EXAMINE, |reply| Command::Plan(Box::new(request), reply)).await?
    }

    /// Checks what a connection needs, one result a check. With neither profile nor options: what needs no proxy.
    async fn diagnose(
        &self,
        profile: &str,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<Check>, Error> {
        let request = self.request(profile, options, &header).await?.map(|(request, _)| Box::new(request));
        let _place = self.place()?;
        self.tell(EXAMINE, |reply| Command::Diagnose(request, reply)).await
    }

    /// Stores the TOML text that the descriptor gives as a profile.
    async fn import_profile(
        &self,
        text: zbus::OwnedFd,
        options: HashMap<String, OwnedVariant>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<OwnedObjectPath, Error> {
        let (name, replace) = options::import(options)?;
        let bytes = descriptor::read(text.into(), MAX_TEXT).await.map_err(|error| {
            Error::InvalidProfile(match std::error::Error::source(&error) {
                Some(cause) => format!("the descriptor of the profile: {error}: {cause}"),
                None => format!("the descriptor of the profile: {error}"),
            })
        })?;
        let text = std::str::from_utf8(&bytes).map(str::to_owned);
        let text = text.map_err(|_| Error::InvalidProfile("the profile is not UTF-8 text".to_owned()))?;
        let path = OwnedObjectPath::try_from(profile_path(&name))?;
        let by = if self.authority.is_root(&header).await { Importer::Root } else { Importer::User };
        self.profiles.with_store(move |store| store.import(&name, &text, replace, by)).await?;
        self.profiles.sync(server).await?;
        Ok(path)
    }

    /// Removes an imported profile.
    async fn remove_profile(&self, name: &str, #[zbus(object_server)] server: &ObjectServer) -> Result<(), Error> {
        short(name)?;
        {
            let view = self.handle.view.borrow();
            if view.profile == name && view.state != State::Disconnected && check::profile_name(name).is_ok() {
                return Err(Error::ProfileProtected(format!("the profile \"{name}\" is in use; disconnect first")));
            }
        }
        let name = name.to_owned();
        self.profiles.with_store(move |store| store.remove(&name)).await?;
        self.profiles.sync(server).await
    }

    /// The newest log records, oldest first; 0 means all that are kept. From then on the caller gets `LogEntry`.
    async fn get_log(
        &self,
        count: u32,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<LogRecord>, Error> {
        let sender = header.sender().ok_or_else(|| Error::NotAuthorized("the call names no sender".to_owned()))?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.followers.add(&self.log, count, sender.to_owned(), connection, &self.authority)
    }

    /// The connections in the tunnel.
    async fn list_flows(&self) -> Result<Vec<Flow>, Error> {
        self.tell(ACCEPT, Command::Flows).await
    }

    /// From now on no network without a connection, also after a reboot; or as before. Returns when it is done.
    async fn set_lockdown(&self, on: bool) -> Result<(), Error> {
        let profiles = if on {
            let usable =
                |store: &ProfileStore| store.list().into_iter().filter_map(|entry| entry.result.ok()).collect();
            Some(self.profiles.with_store(move |store| Ok(usable(store))).await?)
        } else {
            None
        };
        self.tell(ACCEPT, |reply| Command::Lockdown(profiles, reply)).await?
    }

    /// A new state, with its phase and reason.
    #[zbus(signal, name = "StateChanged")]
    pub(super) async fn transition(
        emitter: &SignalEmitter<'_>,
        state: &str,
        phase: &str,
        reason: Reason,
    ) -> zbus::Result<()>;

    /// A new log record; sent to the callers of `GetLog` alone.
    #[zbus(signal)]
    pub(super) async fn log_entry(emitter: &SignalEmitter<'_>, record: LogRecord) -> zbus::Result<()>;

    /// Version of the daemon.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    /// `disconnected`, `connecting`, `connected`, `disconnecting` or `blocked`.
    #[zbus(property)]
    fn state(&self) -> &'static str {
        self.handle.view.borrow().state.as_str()
    }

    /// Phase within `connecting` or `disconnecting`.
    #[zbus(property)]
    fn phase(&self) -> &'static str {
        self.handle.view.borrow().phase
    }

    /// Why the state is what it is: a stable code and a sentence for people.
    #[zbus(property)]
    fn reason(&self) -> Reason {
        self.handle.view.borrow().reason.clone()
    }

    /// `proxy`, `torvm` or empty.
    #[zbus(property)]
    fn backend(&self) -> &'static str {
        self.handle.view.borrow().backend
    }

    /// Name of the profile; `adhoc` for a connection without one; empty when disconnected.
    #[zbus(property)]
    fn profile(&self) -> String {
        self.handle.view.borrow().profile.clone()
    }

    /// When the state began, microseconds since 1970-01-01 UTC.
    #[zbus(property)]
    fn since(&self) -> u64 {
        self.handle.view.borrow().since
    }

    /// How far a connection attempt is: percent and what is being done.
    #[zbus(property)]
    fn progress(&self) -> Progress {
        self.handle.view.borrow().progress.clone()
    }

    /// Whether traffic around the tunnel is blocked now.
    #[zbus(property)]
    fn blocking(&self) -> bool {
        self.handle.view.borrow().blocking
    }

    /// Whether nothing may leave without a connection.
    #[zbus(property)]
    fn lockdown(&self) -> bool {
        self.handle.view.borrow().lockdown
    }

    /// What is not as it should be: stable code, severity, text.
    #[zbus(property)]
    fn health(&self) -> Vec<HealthItem> {
        self.handle.view.borrow().health.clone()
    }

    /// Counters of the engine. Not signalled: read it when needed.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn statistics(&self) -> HashMap<String, u64> {
        // A daemon that is about to end has no counters.
        self.tell(COUNT, Command::Statistics).await.unwrap_or_default()
    }
}
