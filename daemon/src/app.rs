//! The process: arguments, log, clean-up mode, bus, signals, systemd.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use proxyvpn_dbus::types::HealthItem;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::backend;
use crate::backend::carrier::{Carrier, Left, Paths};
use crate::config::daemon::{self, DaemonConfig};
use crate::config::store::ProfileStore;
use crate::config::watch::Watch;
use crate::fdstore::{FdStore, Inherited};
use crate::log::Log;
use crate::machine::failure::chain;
use crate::machine::intent::IntentFile;
use crate::machine::lockdown::{Lockdown, LockdownFiles};
use crate::machine::{Machine, Request};
use crate::net::{self, Keep, Keeping, Network, Owned, firewall};
use crate::service::Service;
use crate::systemd;

/// Log records that are kept for `GetLog`.
const LOG_CAPACITY: usize = 1000;

/// Puts a whole machine behind an upstream. Started by systemd or D-Bus activation; see proxyvpnd(8).
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Args {
    /// Settings of the daemon
    #[arg(long, value_name = "FILE", default_value = "/etc/proxyvpn/proxyvpnd.toml")]
    config: PathBuf,
    /// Profiles of the administrator
    #[arg(long, value_name = "DIR", default_value = "/etc/proxyvpn/profiles.d")]
    profiles: PathBuf,
    /// Profiles imported over D-Bus
    #[arg(long, value_name = "DIR", default_value = "/var/lib/proxyvpn/profiles.d")]
    imported: PathBuf,
    /// Journal of network changes
    #[arg(long, value_name = "DIR", default_value = "/var/lib/proxyvpn")]
    state_dir: PathBuf,
    /// Pid file and record of what is wanted
    #[arg(long, value_name = "DIR", default_value = "/run/proxyvpn")]
    runtime_dir: PathBuf,
    /// Kernel and initramfs of the torvm backend
    #[arg(long, value_name = "DIR", default_value = "/usr/lib/proxyvpn/torvm")]
    torvm_image: PathBuf,
    /// Where proxyvpn-qemu(8) listens
    #[arg(long, value_name = "SOCKET", default_value = proxyvpn_torvm::launch::SOCKET)]
    qemu_socket: PathBuf,
    /// error, warn, info, debug or trace; overrides the settings file
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<LevelFilter>,
    /// Undo every change that a daemon made to the network, without any state, and exit
    #[arg(long)]
    cleanup: bool,
    /// With --cleanup, for `proxyctl rescue`: end the process of proxyvpn's that keeps the firewall for a daemon
    #[arg(long, requires = "cleanup", conflicts_with = "stop_post")]
    end_holder: bool,
    /// With --cleanup, for ExecStopPost=: only if the service was stopped for good, and without forgetting what is wanted
    #[arg(long, requires = "cleanup")]
    stop_post: bool,
    /// For proxyvpn-lock.service: put the lock in force, leave it with systemd, and exit
    #[arg(long, conflicts_with_all = ["cleanup", "keep_block"])]
    lock: bool,
    /// When told to end, leave the network blocked for what comes after: a restart, or --cleanup --stop-post; not if systemd stops the
    /// service
    #[arg(long, conflicts_with = "cleanup")]
    keep_block: bool,
}

/// Why the daemon cannot run: the message is complete.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Fatal(String);

impl Fatal {
    fn new(what: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self(format!("{what}: {}", chain(error)))
    }
}

/// Runs the daemon or the clean-up. Exit status 0, or 1 with a message on standard error.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("proxyvpnd: no event loop: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match args {
            Args { cleanup: true, .. } => clean_up(args).await,
            Args { lock: true, .. } => lock().await,
            _ => serve(args).await,
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxyvpnd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `--cleanup`.
async fn clean_up(args: &Args) -> Result<(), Fatal> {
    if args.stop_post && !systemd::stopped_for_good().await {
        println!("the service will be started again: the network stays as it is");
        return Ok(());
    }
    if PidFile::running(&args.runtime_dir) {
        return Err(Fatal(
            "the daemon runs, and would put everything back. Disconnect with `proxyctl disconnect`, or stop the daemon and \
             clean up with `proxyctl rescue`"
                .to_owned(),
        ));
    }
    net::privilege().map_err(|error| Fatal(chain(&error)))?;
    if args.end_holder {
        end_holders(&args.state_dir).await?;
    }
    let lockdown = LockdownFiles::new(&args.state_dir);
    if !args.stop_post {
        end_lockdown(&lockdown).await?;
    } else if lockdown.read() != Lockdown::Off {
        keep_lock().await?;
    }
    // After a stop systemd removes the record with the runtime directory; for a restart it keeps both.
    if !args.stop_post {
        IntentFile::new(&args.runtime_dir)
            .clear()
            .map_err(|error| Fatal::new("cannot remove the record of what is wanted", &error))?;
    }
    let mut network = Network::open(&args.state_dir, Keeping::default())
        .await
        .map_err(|error| Fatal::new("cannot clean up", &error))?;
    // systemd keeps the socket that owns the table until ExecStopPost= has ended, and then lets it go.
    let report = network.clean_up(if args.stop_post { Owned::Expected } else { Owned::Unexpected }).await;
    if !report.removed.is_empty() {
        backend::flush_caches().await;
    }
    for removed in &report.removed {
        println!("{removed}");
    }
    match report.errors.first() {
        None => {
            println!("nothing of proxyvpn is left in the network");
            Ok(())
        }
        Some(_) => {
            let mut lines: Vec<String> = report.errors.iter().map(|error| chain(error)).collect();
            if report.errors.iter().any(|error| matches!(error, net::Error::Firewall(firewall::Error::Owned))) {
                lines.extend(
                    firewall::holders().unwrap_or_default().iter().map(|holder| format!("it is kept by {holder}")),
                );
            }
            Err(Fatal(lines.join("\n")))
        }
    }
}

/// Takes away what can be taken away while somebody keeps the firewall, and then ends who does, if it is a process of ours.
async fn end_holders(state_dir: &Path) -> Result<(), Fatal> {
    let holders = firewall::holders().map_err(|error| Fatal::new("cannot look for who keeps the firewall", &error))?;
    if holders.is_empty() {
        return Ok(());
    }
    let mut network =
        Network::open(state_dir, Keeping::default()).await.map_err(|error| Fatal::new("cannot clean up", &error))?;
    // What fails here is tried again, and told, when the firewall is gone.
    for removed in network.clean_up(Owned::Expected).await.removed {
        println!("{removed}");
    }
    for holder in holders {
        if holder.is_init() {
            return Err(Fatal(format!(
                "{holder} keeps the firewall for a unit; stop that, then repeat this: systemctl stop proxyvpnd.service"
            )));
        }
        match holder.end() {
            Ok(()) => println!("ended {holder}, which kept the firewall"),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(Fatal(format!(
                    "the firewall's table belongs to {holder}, which is not proxyvpn's, so it is left alone: end it, then repeat this"
                )));
            }
            Err(error) => return Err(Fatal::new(&format!("cannot end {holder}, which keeps the firewall"), &error)),
        }
    }
    Ok(())
}

/// Takes lockdown away, whatever its record says.
async fn end_lockdown(files: &LockdownFiles) -> Result<(), Fatal> {
    let failed = |error: &(dyn std::error::Error + 'static)| Fatal::new("cannot turn lockdown off", error);
    let recorded = files.clear().map_err(|error| failed(&error))?;
    let lock = net::lock::state().await.map_err(|error| failed(&error))?;
    if lock == net::lock::State::Owned {
        systemd::stop_lock_alone().await.map_err(|cause| Fatal(format!("cannot take the lock away: {cause}")))?;
    }
    let removed = net::lock::remove().await.map_err(|error| Fatal::new("cannot take the lock away", &error))?;
    let removed = removed || lock != net::lock::State::None;
    if recorded || removed {
        println!("lockdown was on and is off now");
    }
    Ok(())
}

/// What blocks now goes with the daemon: without a lock, lockdown would end.
async fn keep_lock() -> Result<(), Fatal> {
    let failed = |error: net::Error| Fatal::new("lockdown is on, and there is no lock, so the block stays", &error);
    if net::lock::state().await.map_err(failed)? == net::lock::State::None {
        net::lock::install().await.map_err(failed)?;
    }
    println!("lockdown is on: nothing leaves until the daemon connects");
    Ok(())
}

/// `--lock`.
async fn lock() -> Result<(), Fatal> {
    net::privilege().map_err(|error| Fatal(chain(&error)))?;
    let inherited = Inherited::take().named(net::lock::SOCKET);
    let Some(store) = FdStore::from_env() else {
        return Err(Fatal("--lock is for systemd, which keeps the lock: systemctl start proxyvpn-lock".to_owned()));
    };
    let locked = net::lock::install_kept(inherited, Arc::new(store)).await;
    locked.map_err(|error| Fatal::new("cannot put the lock in force", &error))?;
    systemd::notify(&[NotifyState::Ready]);
    Ok(())
}

async fn serve(args: &Args) -> Result<(), Fatal> {
    // A daemon that did not start because of them could tell nobody, and would leave a network that was blocked as it is.
    let (settings, ignored) = match daemon::load(&args.config) {
        Ok(settings) => (settings, None),
        Err(error) => (DaemonConfig::default(), Some(chain(&error))),
    };
    let log = start_log(args, &settings);
    let ignored = ignored.map(|cause| {
        tracing::error!("the settings are ignored: {cause}");
        HealthItem {
            code: "settings-ignored".to_owned(),
            severity: "error".to_owned(),
            text: format!(
                "The daemon runs with its default settings: {cause}. Mend the file, then `systemctl restart proxyvpnd`"
            ),
        }
    });
    let _pid_file = PidFile::create(&args.runtime_dir)?;

    let store = Arc::new(ProfileStore::open(&args.profiles, &args.imported));
    let intent = IntentFile::new(&args.runtime_dir);
    let (machine, handle) = Machine::new(ignored.into_iter().collect(), intent, autoconnect(&store));
    let service = Service::start(zbus::connection::Builder::system(), handle, Arc::clone(&store), log)
        .await
        .map_err(|error| Fatal(chain(&error)))?;
    let bus = service.connection().clone();
    let paths = Paths {
        state: args.state_dir.clone(),
        runtime: args.runtime_dir.clone(),
        image: args.torvm_image.clone(),
        launcher: args.qemu_socket.clone(),
    };
    let (keeping, vm) = keeping().await;
    let world = Carrier::new(paths, settings.queues, settings.limits(), bus, keeping, vm);

    let (stop, shutdown) = watch::channel(false);
    let (leave, mut left) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop, leave, args.keep_block));
    systemd::notify(&[NotifyState::Ready]);
    tokio::spawn(systemd::watchdog());
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
    let lockdown = LockdownFiles::new(&args.state_dir);
    tokio::select! {
        Ok(_) = left.wait_for(|leave| *leave) => {}
        () = machine.run(world, lockdown, shutdown) => {}
        () = follow_files(args, &service) => {}
        // Nothing is taken down: what is in force blocks until the next daemon goes on.
        () = service.connection().closed() => {
            return Err(Fatal("the system bus is gone; the network stays as it is until the daemon starts again".to_owned()));
        }
    }
    systemd::notify(&[NotifyState::Stopping]);
    service.stop().await;
    Ok(())
}

/// What an earlier daemon left, and where this one leaves what is to outlive it.
async fn keeping() -> (Keeping, Option<Left>) {
    let mut inherited = Inherited::take();
    let store = match FdStore::from_env() {
        Some(store) if systemd::keeps_descriptors().await => Some(Arc::new(store) as Arc<dyn Keep>),
        _ => None,
    };
    let (firewall, tunnel) = (inherited.named(Keeping::FIREWALL), inherited.all(Keeping::TUNNEL));
    let vm = Left::take(&mut inherited);
    (Keeping { store, firewall, tunnel }, vm)
}

/// Keeps the profiles on the bus those of the files, for ever.
async fn follow_files(args: &Args, service: &Service) {
    let follow = async {
        let files = Watch::new(&[&args.profiles, &args.imported])?;
        loop {
            files.changed().await?;
            if let Err(error) = service.reload().await {
                tracing::warn!("the profiles cannot be offered anew: {error}");
            }
        }
    };
    let Err::<std::convert::Infallible, std::io::Error>(error) = follow.await;
    tracing::warn!("changes of the profile files are not seen until the daemon starts again: {error}");
    std::future::pending().await
}

fn start_log(args: &Args, settings: &DaemonConfig) -> Log {
    let level = args.log_level.unwrap_or(settings.log_level);
    let log = Log::new(LOG_CAPACITY);
    // The journal has times of its own.
    let stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false).without_time();
    tracing_subscriber::registry().with(log.clone().filtered()).with(stderr.with_filter(level)).init();
    log
}

/// The profile that is to be connected when the daemon starts: the first by name.
fn autoconnect(store: &ProfileStore) -> Option<Request> {
    let mut wanted = Vec::new();
    for entry in store.list() {
        match entry.result {
            Ok(profile) if profile.autoconnect => wanted.push(profile),
            Ok(_) => {}
            Err(error) => tracing::warn!("profile {}: {}", entry.name, chain(&error)),
        }
    }
    wanted.sort_by(|left, right| left.name.cmp(&right.name));
    if let [first, rest @ ..] = wanted.as_slice()
        && !rest.is_empty()
    {
        tracing::warn!("several profiles have autoconnect = true; {} is taken", first.name);
    }
    wanted.into_iter().next().map(|profile| Request { profile, password: None })
}

/// `stop` gives the network back, and has a virtual machine power off; `leave` leaves all as it is for what comes after.
async fn stop_on_signal(stop: watch::Sender<bool>, leave: watch::Sender<bool>, keep_block: bool) {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        tracing::error!("signals cannot be caught; a kill will leave the network blocked");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("told to end");
    let told = if keep_block && !systemd::is_stopped().await { leave } else { stop };
    let _ = told.send(true);
    told.closed().await;
}

/// The pid file; its lock says that the daemon runs, whatever its text says.
#[derive(Debug)]
struct PidFile {
    path: PathBuf,
    _file: fs::File,
}

impl PidFile {
    /// Whether a daemon holds the lock.
    fn running(directory: &Path) -> bool {
        // Never waits, whatever lies there.
        let mut options = fs::OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(directory.join("proxyvpnd.pid"))
            .is_ok_and(|file| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
    }

    fn create(directory: &Path) -> Result<Self, Fatal> {
        let path = directory.join("proxyvpnd.pid");
        let shown = path.display();
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // Whoever can open it can lock it, and then no daemon starts and no clean-up runs.
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|error| Fatal::new(&format!("cannot write {shown}"), &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Fatal(format!("another proxyvpnd runs already ({shown} is locked)")));
            }
            Err(fs::TryLockError::Error(error)) => return Err(Fatal::new(&format!("cannot lock {shown}"), &error)),
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|error| Fatal::new(&format!("cannot write {shown}"), &error))?;
        Ok(Self { path, _file: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn nobody_else_can_lock_the_pid_file() {
        let dir = crate::test_dir::TestDir::new("pid");
        let directory = dir.path("");
        assert!(!PidFile::running(&directory));
        let held = PidFile::create(&directory).unwrap();
        assert!(PidFile::running(&directory));
        assert!(PidFile::create(&directory).unwrap_err().to_string().contains("runs already"));
        assert_eq!(fs::metadata(dir.path("proxyvpnd.pid")).unwrap().permissions().mode() & 0o7777, 0o600);
        drop(held);
        assert!(!PidFile::running(&directory));
    }

    #[test]
    fn a_link_in_the_place_of_the_pid_file_is_not_followed() {
        let dir = crate::test_dir::TestDir::new("pid-link");
        std::os::unix::fs::symlink(dir.path("elsewhere"), dir.path("proxyvpnd.pid")).unwrap();
        assert!(PidFile::create(&dir.path("")).is_err());
        assert!(!dir.path("elsewhere").exists());
    }
}
