//! The phases of a connection attempt, in their order.

use crate::config::profile::{Backend, Profile, Scheme};

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
    /// The device that leads to the virtual machine.
    CreateTap,
    /// The virtual machine, and the engine that carries what it sends.
    LaunchVm,
    /// The virtual machine's end of the device.
    WaitTap,
    /// From here on nothing goes around the virtual machine, and traffic goes into it.
    ConfigureTap,
    /// Tor's way into its network.
    WaitBootstrap,
}

impl Phase {
    /// The phases of a profile's attempt. The upstream is asked where there is one.
    #[must_use]
    pub fn of(profile: &Profile) -> Vec<Self> {
        let asks = |phase: &Self| matches!(phase, Self::ResolveUpstream | Self::ProbeUpstream);
        match (profile.backend, profile.upstream.scheme) {
            (Backend::Proxy, _) => Self::PROXY.to_vec(),
            (Backend::TorVm, Scheme::Direct) => Self::TORVM.into_iter().filter(|phase| !asks(phase)).collect(),
            (Backend::TorVm, _) => Self::TORVM.to_vec(),
        }
    }

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

    /// The torvm backend's phases, where Tor has an upstream.
    pub const TORVM: [Self; 10] = [
        Self::CheckPrivileges,
        Self::ResolveUpstream,
        Self::ProbeUpstream,
        Self::SaveNetwork,
        Self::CreateTap,
        Self::LaunchVm,
        Self::WaitTap,
        Self::ConfigureTap,
        Self::FlushDns,
        Self::WaitBootstrap,
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
            Self::CreateTap => "create-tap",
            Self::LaunchVm => "launch-vm",
            Self::WaitTap => "wait-tap",
            Self::ConfigureTap => "configure-tap",
            Self::WaitBootstrap => "wait-bootstrap",
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
            Self::CreateTap => "Creating the device to the virtual machine",
            Self::LaunchVm => "Starting the virtual machine",
            Self::WaitTap => "Waiting for the virtual machine",
            Self::ConfigureTap => "Closing the firewall and routing traffic into the virtual machine",
            Self::WaitBootstrap => "Waiting for Tor",
        }
    }

    /// Whether the phase waits for others and changes nothing, so that it may be dropped half-way.
    #[must_use]
    pub const fn interruptible(self) -> bool {
        matches!(self, Self::ResolveUpstream | Self::ProbeUpstream | Self::WaitTap | Self::WaitBootstrap)
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
            | Self::FlushDns
            | Self::CreateTap
            | Self::LaunchVm
            | Self::WaitTap
            | Self::ConfigureTap
            | Self::WaitBootstrap => true,
        }
    }
}

/// A phase of `disconnecting`, published as it passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The virtual machine powers off. Nothing leaves meanwhile.
    Shutdown,
    /// The network becomes what it was.
    RestoreNetwork,
    /// Caches and records of what is over.
    CleanUp,
}

impl Ending {
    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Shutdown => "shutdown",
            Self::RestoreNetwork => "restore-network",
            Self::CleanUp => "cleanup",
        }
    }

    /// What is being done, for people.
    #[must_use]
    pub const fn summary(self) -> &'static str {
        match self {
            Self::Shutdown => "Shutting the virtual machine down",
            Self::RestoreNetwork => "Giving the network back",
            Self::CleanUp => "Clearing up",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::profile;
    use super::*;

    #[test]
    fn tor_without_an_upstream_has_no_phases_for_it() {
        let mut profile = profile();
        assert_eq!(Phase::of(&profile), Phase::PROXY);
        profile.backend = Backend::TorVm;
        assert_eq!(Phase::of(&profile), Phase::TORVM);
        profile.upstream.scheme = Scheme::Direct;
        let names = Phase::of(&profile).into_iter().map(Phase::as_str).collect::<Vec<_>>().join(" ");
        assert_eq!(
            names,
            "check-privileges save-network create-tap launch-vm wait-tap configure-tap flush-dns wait-bootstrap"
        );
    }
}
