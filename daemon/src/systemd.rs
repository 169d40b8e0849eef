//! What systemd is told, and asked.

use std::time::Duration;

use sd_notify::NotifyState;
use zbus::{Connection, OwnedObjectPath, OwnedVariant};

const SYSTEMD: &str = "org.freedesktop.systemd1";
/// PID 1 answers at once, or is in trouble.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Tells systemd that the event loop turns, twice in each watchdog period (sd_watchdog_enabled(3)).
pub(crate) async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut timer = tokio::time::interval(period / 2);
    loop {
        timer.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// sd_notify(3); without systemd, nothing.
pub(crate) fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd cannot be told: {error}");
    }
}

/// For ExecStopPost=: whether the service stays down. After a failure systemd starts it again; after `systemctl restart`, and
/// so after an upgrade, too. What cannot be found out counts as a stop: nobody would open the network later.
pub(crate) async fn stopped_for_good() -> bool {
    // systemd.exec(5). A start has no time limit in our unit, so `timeout` can only be that of a stop.
    let deliberate = matches!(std::env::var("SERVICE_RESULT").as_deref(), Ok("success" | "timeout"));
    deliberate && job().await.as_deref() != Some("restart")
}

/// For the daemon that is told to end: whether the service is stopped. What cannot be found out counts as no: whoever comes after
/// finds all as it was, and decides.
pub(crate) async fn is_stopped() -> bool {
    sd_notify::booted().unwrap_or(false) && job().await.as_deref() == Some("stop")
}

/// Whether somebody keeps descriptors for this service. systemd drops what is over its limit, which is 0 by default, without a
/// word. From version 254 on it tells the limit in the environment (systemd.exec(5)), as does who stands in for it.
pub(crate) async fn keeps_descriptors() -> bool {
    if let Ok(limit) = std::env::var("FDSTORE") {
        return limit.parse::<u32>().is_ok_and(|limit| limit > 0);
    }
    if !sd_notify::booted().unwrap_or(false) {
        return false;
    }
    match tokio::time::timeout(TIMEOUT, store_size()).await {
        Ok(Ok(size)) => size > 0,
        Ok(Err(error)) => {
            tracing::warn!("systemd does not say whether it keeps descriptors: {error}");
            false
        }
        Err(_) => false,
    }
}

async fn store_size() -> zbus::Result<u32> {
    let bus = Connection::system().await?;
    let unit = own_unit(&bus).await?;
    property(&bus, &unit, "org.freedesktop.systemd1.Service", "FileDescriptorStoreMax").await?.try_into()
}

/// What systemd does with the service now, if it can be found out.
async fn job() -> Option<String> {
    match tokio::time::timeout(TIMEOUT, job_type()).await {
        Ok(Ok(kind)) => Some(kind),
        Ok(Err(error)) => {
            eprintln!("proxyvpnd: systemd does not say whether this is a restart: {error}");
            None
        }
        Err(_) => None,
    }
}

/// Our unit (org.freedesktop.systemd1(5)).
async fn own_unit(bus: &Connection) -> zbus::Result<OwnedObjectPath> {
    let manager = "/org/freedesktop/systemd1";
    let caller = 0u32;
    let reply =
        bus.call_method(Some(SYSTEMD), manager, Some("org.freedesktop.systemd1.Manager"), "GetUnitByPID", &caller);
    reply.await?.body().deserialize()
}

/// Type of the job that systemd does with our unit, or empty.
async fn job_type() -> zbus::Result<String> {
    let bus = Connection::system().await?;
    let unit = own_unit(&bus).await?;
    let (number, job): (u32, OwnedObjectPath) =
        property(&bus, &unit, "org.freedesktop.systemd1.Unit", "Job").await?.try_into()?;
    if number == 0 {
        return Ok(String::new());
    }
    property(&bus, &job, "org.freedesktop.systemd1.Job", "JobType").await?.try_into()
}

async fn property(bus: &Connection, path: &OwnedObjectPath, interface: &str, name: &str) -> zbus::Result<OwnedVariant> {
    let properties = Some("org.freedesktop.DBus.Properties");
    let reply = bus.call_method(Some(SYSTEMD), path, properties, "Get", &(interface, name)).await?;
    reply.body().deserialize()
}

/// The unit that keeps the lock without a process. A polkit rule lets us start and stop it, and no other.
pub(crate) const LOCK_UNIT: &str = "proxyvpn-lock.service";
/// How long it may take to start.
const LOCK_TIME: Duration = Duration::from_secs(10);
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";

/// Starts the unit and waits until it runs. The error says why it does not.
pub(crate) async fn start_lock(bus: &Connection) -> Result<(), String> {
    match lock_job(bus, "StartUnit").await?.as_str() {
        "active" => Ok(()),
        state => Err(format!("{LOCK_UNIT} is {state} (journalctl -u {LOCK_UNIT} says why)")),
    }
}

/// Stops the unit and waits until it does not run; success where it is not known.
pub(crate) async fn stop_lock(bus: &Connection) -> Result<(), String> {
    match lock_job(bus, "StopUnit").await?.as_str() {
        "inactive" | "failed" => Ok(()),
        state => Err(format!("{LOCK_UNIT} is still {state}; stop it with `systemctl stop {LOCK_UNIT}`")),
    }
}

/// The same, on a connection of its own.
pub(crate) async fn stop_lock_alone() -> Result<(), String> {
    match tokio::time::timeout(TIMEOUT, Connection::system()).await {
        Ok(Ok(bus)) => stop_lock(&bus).await,
        Ok(Err(error)) => Err(format!("no system bus: {error}; stop it with `systemctl stop {LOCK_UNIT}`")),
        Err(_) => Err(format!("the system bus is silent; stop it with `systemctl stop {LOCK_UNIT}`")),
    }
}

/// Gives the unit a job and returns its state afterwards.
async fn lock_job(bus: &Connection, method: &str) -> Result<String, String> {
    if !sd_notify::booted().unwrap_or(false) {
        return Err("systemd does not run here".to_owned());
    }
    let job = async {
        bus.call_method(Some(SYSTEMD), MANAGER_PATH, Some(MANAGER), method, &(LOCK_UNIT, "replace")).await?;
        let reply = bus.call_method(Some(SYSTEMD), MANAGER_PATH, Some(MANAGER), "LoadUnit", &(LOCK_UNIT,)).await?;
        let unit: OwnedObjectPath = reply.body().deserialize()?;
        loop {
            let (number, _): (u32, OwnedObjectPath) = property(bus, &unit, UNIT, "Job").await?.try_into()?;
            if number == 0 {
                return property(bus, &unit, UNIT, "ActiveState").await?.try_into();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(LOCK_TIME, job).await {
        Ok(Ok(state)) => Ok(state),
        Ok(Err(zbus::Error::MethodError(_, Some(text), _))) => Err(format!("systemd refused {LOCK_UNIT}: {text}")),
        Ok(Err(error)) => Err(format!("systemd could not be asked for {LOCK_UNIT}: {error}")),
        Err(_) => Err(format!("systemd did not finish with {LOCK_UNIT} within {} s", LOCK_TIME.as_secs())),
    }
}
