//! `org.proxyvpn1.Profile` objects, one for each profile that can be used.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::names::profile_path;
use zbus::ObjectServer;

use super::guard::Guarded;
use crate::authority::Authority;
use crate::config::profile::{Backend, Profile};
use crate::config::store::{Origin, ProfileStore, StoreError};

/// One profile on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProfileObject {
    profile: Profile,
    origin: Origin,
    text: String,
}

#[zbus::interface(name = "org.proxyvpn1.Profile")]
impl ProfileObject {
    /// Name, as `Connect` takes it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> &str {
        &self.profile.name
    }

    /// `proxy` or `torvm`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn backend(&self) -> &str {
        match self.profile.backend {
            Backend::Proxy => "proxy",
            Backend::TorVm => "torvm",
        }
    }

    /// The upstream as a URL without secrets.
    #[zbus(property(emits_changed_signal = "const"))]
    fn upstream(&self) -> String {
        self.profile.upstream.to_string()
    }

    /// Whether the daemon connects it by itself when it starts.
    #[zbus(property(emits_changed_signal = "const"))]
    fn autoconnect(&self) -> bool {
        self.profile.autoconnect
    }

    /// `system` (the administrator's file) or `imported` (may be removed over the bus).
    #[zbus(property(emits_changed_signal = "const"))]
    fn origin(&self) -> &str {
        match self.origin {
            Origin::System => "system",
            Origin::Imported => "imported",
        }
    }

    /// The profile as TOML without secrets.
    #[zbus(property(emits_changed_signal = "const"))]
    fn text(&self) -> &str {
        &self.text
    }
}

/// The objects that are on the bus now, by name.
#[derive(Debug)]
pub(super) struct Profiles {
    pub(super) store: Arc<ProfileStore>,
    authority: Arc<Authority>,
    published: tokio::sync::Mutex<BTreeMap<String, ProfileObject>>,
}

impl Profiles {
    pub(super) fn new(store: Arc<ProfileStore>, authority: Arc<Authority>) -> Self {
        Self { store, authority, published: tokio::sync::Mutex::default() }
    }

    /// Runs `work`, which does file I/O, on a thread for such.
    pub(super) async fn with_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ProfileStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Error> {
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(result) => result.map_err(|error| store_error(&error)),
            Err(error) => Err(Error::Internal(format!("the profiles cannot be read: {error}"))),
        }
    }

    /// Makes the objects on the bus those of the files. A changed profile vanishes and appears anew.
    pub(super) async fn sync(&self, server: &ObjectServer) -> Result<(), Error> {
        let mut published = self.published.lock().await;
        let wanted = self.with_store(|store| Ok(objects(store))).await?;
        let gone: Vec<String> = published
            .iter()
            .filter(|(name, object)| wanted.get(*name) != Some(object))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            server.remove::<Guarded<ProfileObject>, _>(profile_path(&name)).await?;
            published.remove(&name);
        }
        for (name, object) in wanted {
            if let Entry::Vacant(place) = published.entry(name) {
                let guarded = Guarded { inner: object.clone(), authority: Arc::clone(&self.authority) };
                server.at(profile_path(place.key()), guarded).await?;
                place.insert(object);
            }
        }
        Ok(())
    }
}

fn objects(store: &ProfileStore) -> BTreeMap<String, ProfileObject> {
    let mut objects = BTreeMap::new();
    for entry in store.list() {
        // The text comes by a second look at the file; one that changed in between is left out until the next look.
        match entry.result.map_err(StoreError::from).and_then(|profile| Ok((profile, store.text(&entry.name)?))) {
            Ok((profile, text)) => {
                objects.insert(entry.name, ProfileObject { profile, origin: entry.origin, text });
            }
            Err(error) => {
                tracing::warn!(
                    profile = entry.name,
                    error = &error as &dyn std::error::Error,
                    "profile cannot be used"
                );
            }
        }
    }
    objects
}

/// The store's error with its cause, as the caller gets it.
pub(super) fn store_error(error: &StoreError) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    match error {
        StoreError::NotFound { .. } => Error::NoSuchProfile(text),
        StoreError::Invalid(_) | StoreError::Name(_) | StoreError::TooLong | StoreError::WithoutTor { .. } => {
            Error::InvalidProfile(text)
        }
        StoreError::Exists { .. } => Error::ProfileExists(text),
        StoreError::Protected { .. } => Error::ProfileProtected(text),
        StoreError::Secret => Error::NotAuthorized(text),
        StoreError::Full => Error::LimitExceeded(text),
        StoreError::Write { .. } => Error::Internal(text),
    }
}
