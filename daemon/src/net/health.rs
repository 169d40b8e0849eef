//! Whether what was applied is still there.

use super::desired::{Desired, RULE_PRIORITIES, RULE_PRIORITY, TABLE};
use super::observed::Observed;
use super::plan;
use super::step::{Action, Layer, Stage, Step};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something is not as it should be.
    Warning,
    /// Protection or connection is missing.
    Error,
}

impl Severity {
    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Stable code.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it means and what to do.
    pub text: String,
}

/// The firewall is not there.
pub(super) fn firewall_missing(desired: &Desired) -> Finding {
    let (severity, effect) = if desired.killswitch {
        (Severity::Error, "traffic can go around the tunnel")
    } else {
        (Severity::Warning, "connections from outside may not be answered")
    };
    Finding {
        code: "firewall-missing",
        severity,
        text: format!("The firewall rules were removed or changed by another program: {effect}."),
    }
}

/// Everything but the firewall.
pub(super) fn findings(observed: &Observed, desired: &Desired) -> Vec<Finding> {
    let mut findings = vec![];
    let mut find = |code, severity, text| findings.push(Finding { code, severity, text });
    let steps = plan::plan(observed, desired);
    if let Some(tunnel) = &desired.tunnel {
        match observed.link(&tunnel.name).filter(|link| link.ours) {
            None => find("tunnel-missing", Severity::Error, format!("The tunnel device {} is gone.", tunnel.name)),
            Some(link) if !link.up => {
                find("tunnel-down", Severity::Error, format!("The tunnel device {} was set down.", tunnel.name));
            }
            Some(_) => {
                let changed: Vec<&Step> = steps.iter().filter(|step| step.stage() == Stage::Tunnel).collect();
                if let Some(step) = changed.first() {
                    let text = format!("Another program changed the tunnel device; missing: {}.", step.line());
                    find("tunnel-changed", Severity::Warning, text);
                }
            }
        }
    }
    let missing = |step: &&Step| step.action() == Action::Add && matches!(step.layer(), Layer::Route | Layer::Rule);
    let lost: Vec<&Step> = steps.iter().filter(missing).collect();
    if let Some(step) = lost.first() {
        let text = format!(
            "Another program removed {} of the rules and routes that lead into the tunnel, such as: {}.",
            lost.len(),
            step.line()
        );
        find("steering-changed", Severity::Error, text);
    }
    if observed.foreign_routes > 0 {
        let text = format!(
            "Routing table {TABLE} holds {} routes that are not proxyvpn's; what they match goes around the tunnel.",
            observed.foreign_routes
        );
        find("foreign-routes", Severity::Error, text);
    }
    let ours = RULE_PRIORITY..RULE_PRIORITY + RULE_PRIORITIES;
    if let Some(priority) = observed.foreign_rules.iter().find(|priority| **priority > 0 && **priority < ours.end) {
        let text = format!(
            "A routing rule of another program (priority {priority}) is asked before those of proxyvpn; what it matches may not go through the tunnel (ip rule)."
        );
        find("earlier-rule", Severity::Warning, text);
    }
    if let Some(step) = steps.iter().find(|step| step.layer() == Layer::Sysctl) {
        let text = format!("Strict reverse-path filtering was switched on or changed; set {step}, or connect again.");
        find("reverse-path-filter", Severity::Warning, text);
    }
    let forwarding = |link: &&super::observed::Link| link.forwarding && !link.loopback && !link.ours;
    if desired.killswitch && observed.links.iter().any(|link| forwarding(&link)) {
        let text = "This machine forwards traffic, for example of containers or virtual machines; it is blocked while connected.";
        find("forwarding-blocked", Severity::Info, text.to_owned());
    }
    findings
}
