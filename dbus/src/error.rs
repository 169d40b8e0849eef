//! Errors of calls, named `org.proxyvpn1.Error.*`. What goes wrong after a call was accepted is a
//! [`Reason`](crate::types::Reason) instead.

/// Error of a method call. The text is for people: cause, effect, next step.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.proxyvpn1.Error")]
pub enum Error {
    /// An error of the bus itself.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// polkit refused, or could not be asked.
    NotAuthorized(String),
    /// There is no profile of that name.
    NoSuchProfile(String),
    /// The profile has an error.
    InvalidProfile(String),
    /// A profile of that name exists.
    ProfileExists(String),
    /// The profile belongs to the administrator or is in use.
    ProfileProtected(String),
    /// An option is unknown, has the wrong type or a bad value.
    InvalidOption(String),
    /// Another connection is being made or is there.
    Busy(String),
    /// There is no connection.
    NotConnected(String),
    /// No profile has connected yet, so lockdown could not be left by connecting.
    NeverConnected(String),
    /// This build or this machine cannot do it.
    NotSupported(String),
    /// An argument or the number of waiting calls is over its limit.
    LimitExceeded(String),
    /// Something failed in the daemon; the log says more.
    Internal(String),
}
