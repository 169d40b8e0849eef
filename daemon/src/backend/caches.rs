//! Flushing DNS caches at both ends of a connection, so that answers of before are not used after.

use std::time::Duration;

use zbus::Connection;

const RESOLVED: &str = "org.freedesktop.resolve1";
const TIMEOUT: Duration = Duration::from_secs(2);

/// Asks systemd-resolved, where it runs, to forget its answers. That it does not run, or refuses, changes nothing that the
/// tunnel promises.
pub(super) async fn flush(bus: &Connection) {
    match tokio::time::timeout(TIMEOUT, flush_resolved(bus)).await {
        Ok(Ok(true)) => tracing::debug!("systemd-resolved has flushed its cache"),
        Ok(Ok(false)) => {}
        Ok(Err(error)) => tracing::warn!("systemd-resolved keeps its cache: {error}"),
        Err(_) => tracing::warn!("systemd-resolved does not answer; its cache is kept"),
    }
}

/// [`flush`] for a process that has no connection to the bus. Without a bus there is no systemd-resolved that could be asked.
pub async fn flush_alone() {
    if let Ok(Ok(bus)) = tokio::time::timeout(TIMEOUT, Connection::system()).await {
        flush(&bus).await;
    }
}

async fn flush_resolved(bus: &Connection) -> zbus::Result<bool> {
    let name = RESOLVED.try_into()?;
    if !zbus::fdo::DBusProxy::new(bus).await?.name_has_owner(name).await? {
        return Ok(false);
    }
    let path = "/org/freedesktop/resolve1";
    bus.call_method(Some(RESOLVED), path, Some("org.freedesktop.resolve1.Manager"), "FlushCaches", &()).await?;
    Ok(true)
}
