//! Well-known names.

/// Bus name that the daemon owns.
pub const BUS: &str = "org.proxyvpn1";
/// Object with the `Manager` interface and the `ObjectManager`.
pub const MANAGER_PATH: &str = "/org/proxyvpn1";
/// Interface of [`MANAGER_PATH`].
pub const MANAGER: &str = "org.proxyvpn1.Manager";
/// Parent of the profile objects; the last path element is the escaped profile name.
pub const PROFILE_PATH: &str = "/org/proxyvpn1/profile";
/// Interface of a profile object.
pub const PROFILE: &str = "org.proxyvpn1.Profile";

/// Object with what only the torvm backend has.
pub const TORVM_PATH: &str = "/org/proxyvpn1/torvm";
/// Interface of [`TORVM_PATH`].
pub const TORVM: &str = "org.proxyvpn1.TorVm";

/// Target of the log records that come from Tor and its virtual machine ([`LogRecord`](crate::types::LogRecord)).
pub const TOR_LOG: &str = "torvm";

/// polkit actions (`polkit/org.proxyvpn1.policy`).
pub mod action {
    /// Connect an approved profile.
    pub const CONNECT: &str = "org.proxyvpn1.connect";
    /// Disconnect.
    pub const DISCONNECT: &str = "org.proxyvpn1.disconnect";
    /// Connect with settings that the caller gives, instead of an approved profile.
    pub const CONNECT_ADHOC: &str = "org.proxyvpn1.connect-adhoc";
    /// Import or remove profiles.
    pub const MANAGE_PROFILES: &str = "org.proxyvpn1.manage-profiles";
    /// Let traffic to the local network go around the tunnel.
    pub const ALLOW_LAN: &str = "org.proxyvpn1.allow-lan";
    /// Read the daemon's log.
    pub const READ_LOG: &str = "org.proxyvpn1.read-log";
    /// List the connections in the tunnel.
    pub const INSPECT_FLOWS: &str = "org.proxyvpn1.inspect-flows";
    /// Turn lockdown on or off.
    pub const SET_LOCKDOWN: &str = "org.proxyvpn1.set-lockdown";
    /// Let connections from now on take other ways through the Tor network.
    pub const NEW_IDENTITY: &str = "org.proxyvpn1.new-identity";
    /// Read state and profiles.
    pub const STATUS: &str = "org.proxyvpn1.status";
    /// Every action, for tests and documentation.
    pub const ALL: [&str; 10] = [
        CONNECT,
        DISCONNECT,
        CONNECT_ADHOC,
        MANAGE_PROFILES,
        ALLOW_LAN,
        READ_LOG,
        INSPECT_FLOWS,
        SET_LOCKDOWN,
        NEW_IDENTITY,
        STATUS,
    ];
}

/// Object path of the profile `name`: every byte that a D-Bus path element may not hold becomes `_xx` (hex), as systemd's
/// `sd_bus_path_encode` does it.
#[must_use]
pub fn profile_path(name: &str) -> String {
    use std::fmt::Write as _;
    let mut path = format!("{PROFILE_PATH}/");
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && index > 0) {
            path.push(char::from(byte));
        } else {
            let _ = write!(path, "_{byte:02x}");
        }
    }
    path
}
