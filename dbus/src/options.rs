//! Keys of the `a{sv}` arguments. An unknown key is an error, so that a misspelt protection is never silently off.

/// Keys of `Manager.Connect` and `Manager.Plan`. With any of them the call is ad-hoc: it overrides the named profile, or
/// stands for one when the name is empty, and needs `org.proxyvpn1.connect-adhoc`.
pub mod connect {
    /// `s`: `http://[user@]host:port`; no password.
    pub const PROXY_URL: &str = "proxy-url";
    /// `s`: user name for the proxy.
    pub const USERNAME: &str = "username";
    /// `h`: readable descriptor that gives the password (at most 4 KiB, one trailing newline is dropped).
    pub const PASSWORD: &str = "password";
    /// `as`: addresses of the proxy, which save its look-up.
    pub const PROXY_IP: &str = "proxy-ip";
    /// `s`: name of the TUN device.
    pub const TUN_NAME: &str = "tun-name";
    /// `s`: IPv4 address and prefix of the TUN device.
    pub const TUN_CIDR: &str = "tun-cidr";
    /// `s`: IPv6 address and prefix of the TUN device.
    pub const TUN_CIDR6: &str = "tun-cidr6";
    /// `u`: MTU of the TUN device, 1280 to 65535.
    pub const MTU: &str = "mtu";
    /// `as`: resolvers that may be asked around the tunnel.
    pub const DNS: &str = "dns";
    /// `b`: block what does not go through the tunnel (default true).
    pub const KILLSWITCH: &str = "killswitch";
    /// `as`: prefixes that go around the tunnel; needs `org.proxyvpn1.allow-lan` too.
    pub const LAN: &str = "lan";
    /// `as`: local users whose traffic goes around the tunnel.
    pub const BYPASS_USERS: &str = "bypass-users";
    /// `b`: log at debug level for this connection.
    pub const VERBOSE: &str = "verbose";
}

/// Keys of `Manager.ImportProfile`.
pub mod import {
    /// `s`: name of the profile (required).
    pub const NAME: &str = "name";
    /// `b`: replace a profile of that name (default false).
    pub const REPLACE: &str = "replace";
}

/// Keys of the reply of `Manager.Status`: every property of the interface by its own name, and these.
pub mod status {
    /// `s`: how the firewall is applied: `nftnl`, `nft`, `iptables`, or empty when there is none.
    pub const FIREWALL: &str = "Firewall";
    /// `s`: the upstream as a URL without secrets.
    pub const UPSTREAM: &str = "Upstream";
    /// `s`: name of the tunnel device, empty when there is none.
    pub const DEVICE: &str = "Device";
    /// `as`: resolvers that are reached around the tunnel.
    pub const RESOLVERS: &str = "Resolvers";
    /// As the property of `TorVm`; this and the next three only with the torvm backend.
    pub const BOOTSTRAP: &str = "Bootstrap";
    /// As the property of `TorVm`.
    pub const ACCELERATOR: &str = "Accelerator";
    /// As the property of `TorVm`.
    pub const ACCELERATOR_REASON: &str = "AcceleratorReason";
    /// As the property of `TorVm`.
    pub const TRANSPORT: &str = "Transport";
}
