//! What the daemon signals, as one stream.

use futures_util::StreamExt as _;
use futures_util::stream::{self, LocalBoxStream, SelectAll};
use proxyvpn_dbus::names;
use proxyvpn_dbus::types::{Bootstrap, Progress, Reason};
use zbus::fdo::PropertiesProxy;
use zbus::proxy::CacheProperties;

use crate::bus::{Bus, failure};
use crate::exit::Failure;

/// Something that the daemon signalled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// `StateChanged`.
    State {
        /// State by name.
        state: String,
        /// Phase or empty.
        phase: String,
        /// Why.
        reason: Reason,
    },
    /// `Progress` changed.
    Progress {
        /// The phase that it belongs to, if that changed too.
        phase: Option<String>,
        /// How far it is.
        progress: Progress,
    },
    /// Tor got further, or warns.
    Bootstrap(Bootstrap),
    /// Another property changed.
    Other,
    /// The daemon left the bus, or the bus left us.
    Vanished,
}

/// The stream of [`Event`]s. It must be polled while calls are made, or it holds up their replies.
pub(crate) struct Events(SelectAll<LocalBoxStream<'static, Event>>);

impl Events {
    /// Subscribes. Nothing that happens after this is missed; a daemon that does not run is not started.
    pub(crate) async fn subscribe(bus: &Bus) -> Result<Self, Failure> {
        let fail = |error: zbus::Error| failure(error.into());
        let states = bus.manager.receive_transition().await.map_err(fail)?.map(|signal| {
            signal.args().map_or(Event::Other, |args| Event::State {
                state: args.state.to_owned(),
                phase: args.phase.to_owned(),
                reason: args.reason.clone(),
            })
        });
        let properties = PropertiesProxy::builder(&bus.connection)
            .destination(names::BUS)
            .path(names::MANAGER_PATH)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(fail)?;
        let changes = properties.receive_properties_changed().await.map_err(fail)?.map(|signal| {
            let progress = signal.args().ok().and_then(|args| {
                let value = |name| args.changed_properties.get(name)?.try_to_owned().ok();
                let progress = Progress::try_from(value("Progress")?).ok()?;
                let phase = value("Phase").and_then(|phase| String::try_from(phase).ok());
                Some(Event::Progress { phase, progress })
            });
            progress.unwrap_or(Event::Other)
        });
        let tor = PropertiesProxy::builder(&bus.connection)
            .destination(names::BUS)
            .path(names::TORVM_PATH)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(fail)?;
        let tor = tor.receive_properties_changed().await.map_err(fail)?.map(|signal| {
            let bootstrap = signal.args().ok().and_then(|args| {
                let value = args.changed_properties.get("Bootstrap")?.try_to_owned().ok()?;
                Bootstrap::try_from(value).ok()
            });
            bootstrap.map_or(Event::Other, Event::Bootstrap)
        });
        let owners = bus.manager.inner().receive_owner_changed().await.map_err(fail)?;
        let owners = owners.map(|owner| if owner.is_none() { Event::Vanished } else { Event::Other });
        // A stream that ends means that the bus is gone.
        let gone = || stream::once(std::future::ready(Event::Vanished));
        Ok(Self(stream::select_all([
            states.chain(gone()).boxed_local(),
            changes.chain(gone()).boxed_local(),
            tor.chain(gone()).boxed_local(),
            owners.chain(gone()).boxed_local(),
        ])))
    }

    /// The next event.
    pub(crate) async fn next(&mut self) -> Event {
        self.0.next().await.unwrap_or(Event::Vanished)
    }

    /// Waits for an event, and takes with it those that have come already. Gives back whether the daemon is still there.
    pub(crate) async fn settle(&mut self) -> bool {
        let mut event = self.next().await;
        loop {
            if event == Event::Vanished {
                return false;
            }
            match futures_util::FutureExt::now_or_never(self.next()) {
                Some(next) => event = next,
                None => return true,
            }
        }
    }
}
