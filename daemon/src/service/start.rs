//! Registers the objects, then takes the name: a caller that activates the daemon never sees half a service.

use std::sync::Arc;

use proxyvpn_dbus::names::{BUS, MANAGER_PATH, TORVM_PATH};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use zbus::fdo::{ObjectManager, RequestNameFlags};
use zbus::{Connection, connection};

use super::followers::Followers;
use super::guard::Guarded;
use super::manager::{EXAMINERS, Manager};
use super::profiles::Profiles;
use super::publish;
use super::torvm::TorVm;
use crate::authority::Authority;
use crate::config::store::ProfileStore;
use crate::log::Log;
use crate::machine::Handle;

/// Why there is no service on the bus.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No bus.
    #[error("cannot connect to the system bus; is dbus running?")]
    Connect(#[source] zbus::Error),
    /// The objects cannot be registered.
    #[error("cannot offer the service on the system bus")]
    Register(#[source] zbus::Error),
    /// The profiles cannot be registered.
    #[error("cannot offer the profiles on the system bus")]
    Profiles(#[source] proxyvpn_dbus::Error),
    /// The name is not to be had.
    #[error(
        "cannot own {BUS} on the system bus; another daemon runs, or /usr/share/dbus-1/system.d/{BUS}.conf is missing"
    )]
    Name(#[source] zbus::Error),
}

/// The service on the bus, until it is dropped.
#[derive(Debug)]
pub struct Service {
    connection: Connection,
    profiles: Arc<Profiles>,
    publisher: JoinHandle<()>,
}

impl Service {
    /// Connects, registers everything and takes the name.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        builder: connection::Builder<'_>,
        handle: Handle,
        store: Arc<ProfileStore>,
        log: Log,
    ) -> Result<Self, StartError> {
        let connection = builder.build().await.map_err(StartError::Connect)?;
        let service = Self::register(connection, handle, store, log).await?;
        let name = service.connection.request_name_with_flags(BUS, RequestNameFlags::DO_NOT_QUEUE).await;
        name.map_err(StartError::Name)?;
        Ok(service)
    }

    /// Everything but the name.
    pub(super) async fn register(
        connection: Connection,
        handle: Handle,
        store: Arc<ProfileStore>,
        log: Log,
    ) -> Result<Self, StartError> {
        let authority = Arc::new(Authority::new(&connection).await.map_err(StartError::Register)?);
        let profiles = Arc::new(Profiles::new(store, Arc::clone(&authority)));
        let view = handle.view.clone();
        let tor = TorVm { handle: handle.clone(), profiles: Arc::clone(&profiles) };
        let manager = Manager {
            handle,
            authority: Arc::clone(&authority),
            profiles: Arc::clone(&profiles),
            log: log.clone(),
            followers: Followers::default(),
            examiners: Semaphore::new(EXAMINERS),
        };
        let server = connection.object_server();
        let manager = Guarded { inner: manager, authority: Arc::clone(&authority) };
        server.at(MANAGER_PATH, manager).await.map_err(StartError::Register)?;
        let tor = Guarded { inner: tor, authority: Arc::clone(&authority) };
        server.at(TORVM_PATH, tor).await.map_err(StartError::Register)?;
        let objects = Guarded { inner: ObjectManager, authority };
        server.at(MANAGER_PATH, objects).await.map_err(StartError::Register)?;
        profiles.sync(server).await.map_err(StartError::Profiles)?;
        let follow = publish::follow(view, connection.clone(), log);
        let publisher = tokio::spawn(async move {
            if let Err(error) = follow.await {
                tracing::error!(error = &error as &dyn std::error::Error, "changes are no longer told on the bus");
            }
        });
        Ok(Self { connection, profiles, publisher })
    }

    /// Looks at the profile files again.
    ///
    /// # Errors
    /// The bus connection is broken.
    pub async fn reload(&self) -> Result<(), proxyvpn_dbus::Error> {
        self.profiles.sync(self.connection.object_server()).await
    }

    /// The connection, which also ends when the bus does.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Gives the name back, so that the next call activates a new daemon.
    pub async fn stop(self) {
        if let Err(error) = self.connection.release_name(BUS).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "cannot give the bus name back");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.publisher.abort();
    }
}
