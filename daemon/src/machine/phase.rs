//! The phases of a connection attempt, in their order.

/// A phase of `connecting`, published as it passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Capability, TUN node, free device name, firewall.
    CheckPrivileges,
    /// Addresses and credentials of the upstream.
    ResolveUpstream,
    /// Is the upstream there, and does it let us in?
    ProbeUpstream,
    /// Journal that the network is about to change.
    SaveNetwork,
    /// The device, and the engine behind it.
    CreateTun,
    /// From here on nothing goes around the tunnel.
    ApplyFirewall,
    /// From here on traffic goes into the tunnel.
    ApplyRoutes,
    /// Resolver settings.
    ConfigureDns,
    /// Cached answers of before.
    FlushDns,
}

impl Phase {
    /// The proxy backend's phases.
    pub const PROXY: [Self; 9] = [
        Self::CheckPrivileges,
        Self::ResolveUpstream,
        Self::ProbeUpstream,
        Self::SaveNetwork,
        Self::CreateTun,
        Self::ApplyFirewall,
        Self::ApplyRoutes,
        Self::ConfigureDns,
        Self::FlushDns,
    ];

    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CheckPrivileges => "check-privileges",
            Self::ResolveUpstream => "resolve-upstream",
            Self::ProbeUpstream => "probe-upstream",
            Self::SaveNetwork => "save-network",
            Self::CreateTun => "create-tun",
            Self::ApplyFirewall => "apply-firewall",
            Self::ApplyRoutes => "apply-routes",
            Self::ConfigureDns => "configure-dns",
            Self::FlushDns => "flush-dns",
        }
    }

    /// What is being done, for people.
    #[must_use]
    pub const fn summary(self) -> &'static str {
        match self {
            Self::CheckPrivileges => "Checking privileges",
            Self::ResolveUpstream => "Looking up the upstream",
            Self::ProbeUpstream => "Asking the upstream",
            Self::SaveNetwork => "Saving the network's state",
            Self::CreateTun => "Creating the tunnel device",
            Self::ApplyFirewall => "Closing the firewall",
            Self::ApplyRoutes => "Routing traffic into the tunnel",
            Self::ConfigureDns => "Configuring name resolution",
            Self::FlushDns => "Flushing DNS caches",
        }
    }

    /// Whether the phase waits for others and changes nothing, so that it may be dropped half-way.
    #[must_use]
    pub const fn interruptible(self) -> bool {
        matches!(self, Self::ResolveUpstream | Self::ProbeUpstream)
    }

    /// Whether the network may differ from before once the phase has begun.
    #[must_use]
    pub const fn touches_network(self) -> bool {
        match self {
            Self::CheckPrivileges | Self::ResolveUpstream | Self::ProbeUpstream => false,
            Self::SaveNetwork
            | Self::CreateTun
            | Self::ApplyFirewall
            | Self::ApplyRoutes
            | Self::ConfigureDns
            | Self::FlushDns => true,
        }
    }
}
