//! The system bus and the daemon on it; what their errors mean for people.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use proxyvpn_dbus::client::ManagerProxy;
use proxyvpn_dbus::{Error, names};
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedVariant, Variant, fdo};

use crate::exit::{Exit, Failure};

/// A reply that needs no people, as libdbus has it.
pub(crate) const REPLY: Duration = Duration::from_secs(25);
/// A reply that waits for somebody to type a password.
pub(crate) const AUTHENTICATED: Duration = Duration::from_secs(300);

/// The daemon, over the system bus.
pub(crate) struct Bus {
    /// The connection.
    pub(crate) connection: Connection,
    /// The daemon's manager. Properties are not cached.
    pub(crate) manager: ManagerProxy<'static>,
}

impl Bus {
    /// Connects to the system bus; the daemon is started by the first call.
    pub(crate) async fn open() -> Result<Self, Failure> {
        let unreachable = |cause: String| {
            Failure::new(Exit::Unreachable, cause)
                .advise("proxyvpnd is reached over it. Start the bus (systemctl start dbus), or ask proxyctl doctor.")
        };
        let connection = tokio::time::timeout(Duration::from_secs(10), Connection::system())
            .await
            .map_err(|_| unreachable("the system bus does not answer".to_owned()))?
            .map_err(|error| unreachable(format!("cannot reach the system bus: {}", short(&error))))?;
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(|error| failure(error.into()))?;
        Ok(Self { connection, manager })
    }

    /// `Manager.Status`.
    pub(crate) async fn status(&self) -> Result<HashMap<String, OwnedVariant>, Failure> {
        bounded(REPLY, self.manager.status()).await
    }

    /// Every profile's name with its properties, sorted by name.
    pub(crate) async fn profiles(&self) -> Result<Vec<(String, HashMap<String, OwnedVariant>)>, Failure> {
        let call = async {
            let proxy = fdo::ObjectManagerProxy::builder(&self.connection)
                .destination(names::BUS)
                .path(names::MANAGER_PATH)
                .build()
                .await?;
            Ok(proxy.get_managed_objects().await.map_err(zbus::Error::from)?)
        };
        let objects = bounded(REPLY, call).await?;
        let mut profiles: Vec<_> = objects
            .into_values()
            .filter_map(|mut interfaces| interfaces.remove(names::PROFILE))
            .map(|mut properties| Ok((take::<String>(&mut properties, "Name")?, properties)))
            .collect::<Result<_, Failure>>()?;
        profiles.sort_by(|(left, _), (right, _)| left.cmp(right));
        Ok(profiles)
    }
}

/// Takes a value out of an `a{sv}`; one that is missing has its default, one of the wrong type is an error.
pub(crate) fn take<T>(map: &mut HashMap<String, OwnedVariant>, key: &str) -> Result<T, Failure>
where
    T: Default + TryFrom<Variant<'static>>,
{
    map.remove(key).map_or_else(
        || Ok(T::default()),
        |value| {
            T::try_from(Variant::from(value)).map_err(|_| {
                Failure::new(Exit::Failure, format!("the daemon's answer has an unknown form ({key})"))
                    .advise("proxyctl and proxyvpnd are of different versions: install both from the same package.")
            })
        },
    )
}

/// Waits for a reply, at most so long.
pub(crate) async fn bounded<T>(limit: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(reply) => reply.map_err(failure),
        Err(_) => Err(silent(limit)),
    }
}

/// The daemon did not answer.
pub(crate) fn silent(limit: Duration) -> Failure {
    Failure::new(Exit::TimedOut, format!("the daemon did not answer within {} s", limit.as_secs()))
        .advise("See its log (journalctl -u proxyvpnd). sudo proxyctl rescue gives the network back without it.")
}

/// The daemon went away.
pub(crate) fn vanished() -> Failure {
    Failure::new(Exit::Unreachable, "the daemon stopped meanwhile").advise(
        "Traffic may still be blocked. proxyctl status starts the daemon again; sudo proxyctl rescue gives the \
         network back without it; journalctl -u proxyvpnd says why it stopped.",
    )
}

/// What an error of a call means.
pub(crate) fn failure(error: Error) -> Failure {
    let told = |exit, text: String, otherwise: &str| {
        Failure::new(exit, if text.trim().is_empty() { otherwise.to_owned() } else { text })
    };
    match error {
        Error::NotAuthorized(text) => told(Exit::NotAuthorised, text, "not authorised").advise(
            "sudo proxyctl may do everything. An administrator can allow it to others: proxyvpn-group.rules, among the \
             examples in /usr/share/doc/proxyvpn, is a rule for a group.",
        ),
        Error::NoSuchProfile(text) => told(Exit::Failure, text, "there is no such profile")
            .advise("proxyctl profile list shows those that exist."),
        Error::InvalidProfile(text) => told(Exit::Failure, text, "the profile has an error"),
        Error::ProfileExists(text) => told(Exit::Failure, text, "a profile of that name exists")
            .advise("--replace puts the new one in its place."),
        Error::ProfileProtected(text) => told(Exit::Failure, text, "the profile cannot be changed"),
        Error::InvalidOption(text) => told(Exit::Usage, text, "a setting has a bad value"),
        Error::Busy(text) => told(Exit::Failure, text, "another connection is there or being made")
            .advise("proxyctl status shows it; proxyctl disconnect ends it."),
        Error::NotConnected(text) => told(Exit::NotConnected, text, "there is no connection"),
        Error::NeverConnected(text) => told(Exit::Failure, text, "no profile has connected yet")
            .advise("A profile counts as it was when it connected; ad-hoc settings do not: proxyctl profile import stores them."),
        Error::NotSupported(text) => told(Exit::Failure, text, "this machine or this build cannot do it"),
        Error::LimitExceeded(text) => told(Exit::Failure, text, "a limit of the daemon is exceeded"),
        Error::Internal(text) => told(Exit::Failure, text, "the daemon failed")
            .advise("The log says more: proxyctl logs, or journalctl -u proxyvpnd."),
        Error::ZBus(error) => bus_failure(&error),
    }
}

/// What an error of the bus itself means.
fn bus_failure(error: &zbus::Error) -> Failure {
    let start = "journalctl -u proxyvpnd says why; proxyctl doctor checks the installation.";
    let activation =
        |why: &str| Failure::new(Exit::Unreachable, format!("the daemon could not be started: {why}")).advise(start);
    match error {
        zbus::Error::FDO(fdo) => match fdo.as_ref() {
            fdo::Error::ServiceUnknown(_) => {
                Failure::new(Exit::Unreachable, "proxyvpnd is not installed on this machine").advise(
                    "The bus knows no service org.proxyvpn1. Install proxyvpn (scripts/install.sh), then try again.",
                )
            }
            fdo::Error::NameHasNoOwner(_) => Failure::new(Exit::Unreachable, "the daemon does not run").advise(start),
            fdo::Error::NoReply(_) | fdo::Error::Disconnected(_) => vanished(),
            fdo::Error::TimedOut(why) | fdo::Error::Timeout(why) => activation(why),
            fdo::Error::SpawnExecFailed(why)
            | fdo::Error::SpawnForkFailed(why)
            | fdo::Error::SpawnChildExited(why)
            | fdo::Error::SpawnChildSignaled(why)
            | fdo::Error::SpawnFailed(why)
            | fdo::Error::SpawnFailedToSetup(why)
            | fdo::Error::SpawnConfigInvalid(why)
            | fdo::Error::SpawnServiceNotValid(why)
            | fdo::Error::SpawnServiceNotFound(why)
            | fdo::Error::SpawnPermissionsInvalid(why)
            | fdo::Error::SpawnFileInvalid(why)
            | fdo::Error::SpawnNoMemory(why) => activation(why),
            fdo::Error::AccessDenied(why)
            | fdo::Error::AuthFailed(why)
            | fdo::Error::InteractiveAuthorizationRequired(why) => {
                Failure::new(Exit::NotAuthorised, format!("the bus refused the call: {why}"))
                    .advise("Its policy file org.proxyvpn1.conf is missing or old: install proxyvpn again.")
            }
            fdo::Error::UnknownMethod(why)
            | fdo::Error::UnknownInterface(why)
            | fdo::Error::UnknownObject(why)
            | fdo::Error::UnknownProperty(why)
            | fdo::Error::InvalidArgs(why) => {
                Failure::new(Exit::Failure, format!("the daemon does not know this call: {why}"))
                    .advise("proxyctl and proxyvpnd are of different versions: install both from the same package.")
            }
            other => Failure::new(Exit::Failure, format!("the bus reports an error: {other}")),
        },
        // systemd's own errors when it cannot start the unit, such as org.freedesktop.systemd1.UnitMasked.
        zbus::Error::MethodError(name, why, _) if name.as_str().starts_with("org.freedesktop.systemd1.") => {
            activation(why.as_deref().unwrap_or(name.as_str()))
        }
        zbus::Error::MethodError(name, why, _) => Failure::new(
            Exit::Failure,
            why.clone()
                .filter(|why| !why.is_empty())
                .unwrap_or_else(|| format!("the daemon reports {}", name.as_str())),
        ),
        zbus::Error::InputOutput(_) | zbus::Error::Connection(..) | zbus::Error::Handshake(_) => {
            Failure::new(Exit::Unreachable, format!("the connection to the system bus broke: {}", short(error)))
                .advise("Start the bus (systemctl start dbus), then try again.")
        }
        other => Failure::new(Exit::Failure, format!("the daemon's answer was not understood: {other}")),
    }
}

/// The innermost cause of an error of the transport.
fn short(error: &zbus::Error) -> String {
    match error {
        zbus::Error::InputOutput(io) => io.to_string(),
        zbus::Error::Connection(io, address) => format!("{io} ({address})"),
        other => other.to_string(),
    }
}
