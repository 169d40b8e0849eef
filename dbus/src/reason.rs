//! Why a connection is not there, as codes that programs may compare.

macro_rules! reason_codes {
    ($($(#[$doc:meta])* $variant:ident = $code:literal,)*) => {
        /// Stable code of a reason (`Manager.Reason`, first field).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ReasonCode { $($(#[$doc])* $variant,)* }

        impl ReasonCode {
            /// Every code, for tests and documentation.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code on the bus.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }
        }
    };
}

reason_codes! {
    /// CAP_NET_ADMIN is missing.
    MissingCapability = "missing-capability",
    /// `/dev/net/tun` cannot be opened.
    TunUnavailable = "tun-unavailable",
    /// A device with the tunnel's name exists and is not ours.
    TunExists = "tun-exists",
    /// The proxy's name has no address.
    UpstreamUnresolvable = "upstream-unresolvable",
    /// This machine has no connection or no default route.
    NoUplink = "no-uplink",
    /// There is a network, but no route to the proxy.
    NoRoute = "no-route",
    /// No TCP connection to the proxy.
    UpstreamUnreachable = "upstream-unreachable",
    /// The proxy accepted the connection and did not answer in time.
    UpstreamSilent = "upstream-silent",
    /// The proxy wants other credentials (407).
    UpstreamAuthentication = "upstream-authentication",
    /// The proxy refuses this machine or CONNECT as such.
    UpstreamRefused = "upstream-refused",
    /// What answered does not speak HTTP.
    UpstreamProtocol = "upstream-protocol",
    /// The proxy runs on this machine and its own traffic would go into the tunnel again.
    UpstreamLoops = "upstream-loops",
    /// A secret could not be read.
    CredentialUnavailable = "credential-unavailable",
    /// The firewall could not be applied.
    FirewallFailed = "firewall-failed",
    /// Another program holds or replaces the firewall's table.
    FirewallTaken = "firewall-taken",
    /// Another program has routes in the routing table, or changes routes and rules again and again.
    RoutesTaken = "routes-taken",
    /// A link, address, route, rule or sysctl could not be changed.
    NetworkFailed = "network-failed",
    /// The tunnel device vanished.
    DeviceLost = "device-lost",
    /// The packet engine stopped.
    EngineFailed = "engine-failed",
    /// The virtual machine's image is missing, or is not the one that was built.
    ImageInvalid = "image-invalid",
    /// The virtual machine did not start, or ended.
    VmFailed = "vm-failed",
    /// The virtual machine runs and does not react.
    VmHung = "vm-hung",
    /// Tor gets no further on its way into its network.
    TorStalled = "tor-stalled",
    /// The record of what was wanted when the last daemon ended cannot be read.
    IntentUnreadable = "intent-unreadable",
    /// Somebody asked for it.
    Requested = "requested",
    /// The backend is not in this build.
    NotSupported = "not-supported",
}

impl std::fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
