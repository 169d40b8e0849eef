//! Who may do what: the one place where polkit is asked. No answer means no.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use proxyvpn_dbus::Error;
use proxyvpn_dbus::names::{MANAGER, PROFILE, TORVM, action};
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::names::UniqueName;
use zbus::proxy::CacheProperties;
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

/// How long a person has for a password.
const PROMPT_TIME: Duration = Duration::from_secs(120);
/// How long polkit has for an answer without a person: more than its rules have there (15 s), less than callers usually wait (25 s).
const SILENT_TIME: Duration = Duration::from_secs(20);
/// The same for a property: its reader keeps the object tree locked against changes.
const READ_TIME: Duration = Duration::from_secs(5);
/// How long an answer to [`action::STATUS`] stays good for the same connection: one look of a client is several calls.
const FRESH: Duration = Duration::from_secs(1);
/// Most connections whose answer is remembered.
const MAX_REMEMBERED: usize = 256;
/// Most questions of one kind (with or without a person) that wait at once.
const MAX_PENDING: usize = 64;
/// Most of them for one user (with a person) or one connection (without).
const MAX_PENDING_EACH: usize = 4;

/// What a method or property needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// This polkit action.
    Action(&'static str),
    /// It depends on the arguments: the method asks itself.
    Arguments,
}

/// Needs of every method. A method that is not here cannot be called.
pub const METHODS: &[(&str, &str, Need)] = &[
    (MANAGER, "Connect", Need::Arguments),
    (MANAGER, "Plan", Need::Arguments),
    (MANAGER, "Diagnose", Need::Arguments),
    (MANAGER, "Disconnect", Need::Action(action::DISCONNECT)),
    (MANAGER, "Reconnect", Need::Action(action::CONNECT)),
    (MANAGER, "Status", Need::Action(action::STATUS)),
    (MANAGER, "ImportProfile", Need::Action(action::MANAGE_PROFILES)),
    (MANAGER, "RemoveProfile", Need::Action(action::MANAGE_PROFILES)),
    (MANAGER, "GetLog", Need::Action(action::READ_LOG)),
    (MANAGER, "ListFlows", Need::Action(action::INSPECT_FLOWS)),
    (MANAGER, "SetLockdown", Need::Action(action::SET_LOCKDOWN)),
    (TORVM, "NewIdentity", Need::Action(action::NEW_IDENTITY)),
    // The guard in them tells much about this machine, and for long.
    (TORVM, "Circuits", Need::Action(action::INSPECT_FLOWS)),
    (TORVM, "SetBridges", Need::Action(action::MANAGE_PROFILES)),
    ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects", Need::Action(action::STATUS)),
];

/// Needs of every property. A property that is not here cannot be read.
pub const PROPERTIES: &[(&str, &str, &str)] = &[
    (MANAGER, "Version", action::STATUS),
    (MANAGER, "State", action::STATUS),
    (MANAGER, "Phase", action::STATUS),
    (MANAGER, "Reason", action::STATUS),
    (MANAGER, "Backend", action::STATUS),
    (MANAGER, "Profile", action::STATUS),
    (MANAGER, "Since", action::STATUS),
    (MANAGER, "Progress", action::STATUS),
    (MANAGER, "Blocking", action::STATUS),
    (MANAGER, "Health", action::STATUS),
    (MANAGER, "Lockdown", action::STATUS),
    (MANAGER, "Statistics", action::STATUS),
    (TORVM, "Bootstrap", action::STATUS),
    (TORVM, "Accelerator", action::STATUS),
    (TORVM, "AcceleratorReason", action::STATUS),
    (TORVM, "Transport", action::STATUS),
    (PROFILE, "Name", action::STATUS),
    (PROFILE, "Backend", action::STATUS),
    (PROFILE, "Upstream", action::STATUS),
    (PROFILE, "Autoconnect", action::STATUS),
    (PROFILE, "Origin", action::STATUS),
    (PROFILE, "Text", action::STATUS),
];

/// What `method` of `interface` needs; `None` when it is not in the table.
#[must_use]
pub fn method_need(interface: &str, method: &str) -> Option<Need> {
    METHODS.iter().find(|(i, m, _)| *i == interface && *m == method).map(|(_, _, need)| *need)
}

/// The action for reading `property` of `interface`; `None` when it is not in the table.
#[must_use]
pub fn property_action(interface: &str, property: &str) -> Option<&'static str> {
    PROPERTIES.iter().find(|(i, p, _)| *i == interface && *p == property).map(|(_, _, action)| *action)
}

/// Asks polkit, about the bus name of the caller: a process id could belong to another process by now.
#[derive(Debug)]
pub struct Authority {
    polkit: AuthorityProxy<'static>,
    bus: DBusProxy<'static>,
    prompts: Pending,
    silent: Pending,
    remembered: Mutex<HashMap<String, Slot>>,
    serial: AtomicU64,
}

/// The answer for one connection. Whoever comes while the question is open waits for the same answer.
type Slot = Arc<tokio::sync::Mutex<Option<(Instant, Result<(), Refusal>)>>>;

/// A no.
#[derive(Debug, Clone)]
enum Refusal {
    Denied(String),
    TooMany,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Denied(text) => Self::NotAuthorized(text),
            Refusal::TooMany => {
                Self::LimitExceeded("too many calls wait for polkit's answer; answer or cancel those first".to_owned())
            }
        }
    }
}

impl Authority {
    /// On the connection whose calls it judges. Does not wait for polkitd, which may start later.
    ///
    /// # Errors
    /// The bus connection is broken.
    pub async fn new(connection: &zbus::Connection) -> zbus::Result<Self> {
        Ok(Self {
            polkit: AuthorityProxy::builder(connection).cache_properties(CacheProperties::No).build().await?,
            bus: DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await?,
            prompts: Pending::default(),
            silent: Pending::default(),
            remembered: Mutex::default(),
            serial: AtomicU64::new(0),
        })
    }

    /// Whether the caller may do `action`. A person is asked only if the call allows it. `details` are for the
    /// administrator's rules (`action.lookup`).
    ///
    /// # Errors
    /// `NotAuthorized`, also when polkit gives no answer; `LimitExceeded`.
    pub async fn check(
        &self,
        header: &Header<'_>,
        action: &'static str,
        details: &HashMap<&str, &str>,
    ) -> Result<(), Error> {
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        if action == action::STATUS && !interactive {
            return self.status(header).await;
        }
        Ok(self.ask(header, action, details, interactive).await?)
    }

    /// Whether the caller may read properties, without asking a person and without waiting for long.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub async fn check_read(&self, header: &Header<'_>) -> Result<(), Error> {
        let answer = tokio::time::timeout(READ_TIME, self.status(header)).await;
        answer.unwrap_or_else(|error| Err(unanswered(action::STATUS, &error).into()))
    }

    /// Whether the caller may read state, without asking a person. An answer holds for a second.
    async fn status(&self, header: &Header<'_>) -> Result<(), Error> {
        // So many connections are busy that this answer is not remembered; what is asked at once stays bounded.
        let Some(slot) = self.slot(sender(header)?.as_str()) else {
            return Ok(self.ask(header, action::STATUS, &HashMap::new(), false).await?);
        };
        let mut slot = slot.lock().await;
        if let Some((when, answer)) = slot.as_ref()
            && when.elapsed() < FRESH
        {
            return Ok(answer.clone()?);
        }
        let answer = self.ask(header, action::STATUS, &HashMap::new(), false).await;
        *slot = Some((Instant::now(), answer.clone()));
        Ok(answer?)
    }

    /// Whether the caller is root. Not known means no.
    pub async fn is_root(&self, header: &Header<'_>) -> bool {
        let Some(sender) = header.sender() else { return false };
        matches!(self.bus.get_connection_unix_user(sender.into()).await, Ok(0))
    }

    /// Ends when `name` has left the bus, or the bus is gone.
    pub async fn vanished(&self, name: &UniqueName<'_>) {
        // Listen first, then look: a name that leaves in between is seen either way.
        let Ok(mut changes) = self.bus.receive_name_owner_changed_with_args(&[(0, name.as_str())]).await else {
            return;
        };
        if !self.bus.name_has_owner(name.into()).await.unwrap_or(false) {
            return;
        }
        while let Some(change) = changes.next().await {
            if change.args().is_ok_and(|args| args.new_owner().is_none()) {
                return;
            }
        }
    }

    async fn ask(
        &self,
        header: &Header<'_>,
        action: &'static str,
        details: &HashMap<&str, &str>,
        interactive: bool,
    ) -> Result<(), Refusal> {
        let sender = sender(header)?;
        let subject = Subject::new_for_message_header(header).map_err(|error| unanswered(action, &error))?;
        if !interactive {
            let _ticket = self.silent.take(sender.as_str()).ok_or(Refusal::TooMany)?;
            let none = CheckAuthorizationFlags::empty();
            let question = self.polkit.check_authorization(&subject, action, details, none, "");
            return match tokio::time::timeout(SILENT_TIME, question).await {
                Ok(Ok(answer)) => verdict(action, &answer, interactive),
                Ok(Err(error)) => Err(unanswered(action, &error)),
                Err(error) => Err(unanswered(action, &error)),
            };
        }
        // One user's forgotten dialogs must not use up everybody's.
        let user = self.bus.get_connection_unix_user(sender.into()).await;
        let user = user.map_err(|error| unanswered(action, &error))?;
        let _ticket = self.prompts.take(&user.to_string()).ok_or(Refusal::TooMany)?;
        let id = format!("proxyvpn-{}", self.serial.fetch_add(1, Ordering::Relaxed));
        let flags = CheckAuthorizationFlags::ALLOW_USER_INTERACTION;
        let ended = tokio::select! {
            answer = self.polkit.check_authorization(&subject, action, details, flags, &id) => match answer {
                Ok(answer) => return verdict(action, &answer, interactive),
                Err(error) => return Err(unanswered(action, &error)),
            },
            () = self.vanished(sender) => "the caller left",
            () = tokio::time::sleep(PROMPT_TIME) => "nobody answered the question in time",
        };
        let cancel = self.polkit.cancel_check_authorization(&id);
        if !matches!(tokio::time::timeout(SILENT_TIME, cancel).await, Ok(Ok(()))) {
            tracing::debug!(action, "polkit did not take back its question");
        }
        Err(Refusal::Denied(format!("not authorised for {action}: {ended}")))
    }

    fn slot(&self, name: &str) -> Option<Slot> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= MAX_REMEMBERED && !remembered.contains_key(name) {
            remembered.retain(|_, slot| {
                Arc::strong_count(slot) > 1
                    || slot.try_lock().is_ok_and(|slot| slot.as_ref().is_some_and(|(when, _)| when.elapsed() < FRESH))
            });
            if remembered.len() >= MAX_REMEMBERED {
                return None;
            }
        }
        Some(Arc::clone(remembered.entry(name.to_owned()).or_default()))
    }
}

fn sender<'h>(header: &'h Header<'_>) -> Result<&'h UniqueName<'h>, Refusal> {
    header.sender().ok_or_else(|| Refusal::Denied("the call names no sender".to_owned()))
}

fn unanswered(action: &str, error: &dyn std::fmt::Display) -> Refusal {
    tracing::warn!(action, "polkit gave no answer: {error}");
    Refusal::Denied(format!(
        "polkit could not be asked about {action}, so the answer is no ({error}); is polkitd running?"
    ))
}

fn verdict(
    action: &str,
    answer: &zbus_polkit::policykit1::AuthorizationResult,
    interactive: bool,
) -> Result<(), Refusal> {
    if answer.is_authorized {
        return Ok(());
    }
    Err(Refusal::Denied(if answer.details.contains_key("polkit.dismissed") {
        format!("not authorised for {action}: the question was dismissed")
    } else if answer.is_challenge && interactive {
        format!("{action} needs a password, and there was nobody to ask: no authentication agent runs for you")
    } else if answer.is_challenge {
        format!("{action} needs a password; call from a terminal or desktop, or have a polkit rule allow it")
    } else {
        format!("polkit does not allow you {action}; an administrator can change that with a polkit rule")
    }))
}

/// Counts open questions: in all and for each key.
#[derive(Debug, Default)]
struct Pending(Mutex<HashMap<String, usize>>);

impl Pending {
    fn take(&self, key: &str) -> Option<Ticket<'_>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<usize>() >= MAX_PENDING || open.get(key).is_some_and(|&n| n >= MAX_PENDING_EACH) {
            return None;
        }
        *open.entry(key.to_owned()).or_default() += 1;
        Some(Ticket { pending: self, key: key.to_owned() })
    }
}

/// One open question.
struct Ticket<'p> {
    pending: &'p Pending,
    key: String,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut open = self.pending.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn questions_are_bounded_for_each_and_for_all() {
        let pending = Pending::default();
        let mut held: Vec<_> = (0..MAX_PENDING_EACH).map(|_| pending.take("a").unwrap()).collect();
        assert!(pending.take("a").is_none());
        held.pop();
        held.push(pending.take("a").unwrap());
        for key in 0.. {
            match pending.take(&format!("k{key}")) {
                Some(ticket) => held.push(ticket),
                None => break,
            }
        }
        assert_eq!(held.len(), MAX_PENDING);
        drop(held);
        assert!(pending.0.lock().unwrap().is_empty(), "nothing is kept of answered questions");
    }

    #[test]
    fn the_policy_file_has_exactly_our_actions() {
        let policy = include_str!("../../polkit/org.proxyvpn1.policy");
        let mut ids: Vec<_> =
            policy.split("<action id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        let mut expected = action::ALL.to_vec();
        ids.sort_unstable();
        expected.sort_unstable();
        assert_eq!(ids, expected);
        let owners = policy.matches("policykit.owner\">unix-user:proxyvpn</annotate>").count();
        assert_eq!(owners, expected.len(), "without it polkit refuses to answer a daemon that is not root");
    }

    #[test]
    fn the_policy_file_has_the_documented_defaults() {
        let policy = include_str!("../../polkit/org.proxyvpn1.policy");
        for id in action::ALL {
            let (any, inactive, active) = match id {
                action::STATUS => ("yes", "yes", "yes"),
                action::CONNECT | action::DISCONNECT | action::NEW_IDENTITY => {
                    ("auth_admin_keep", "auth_admin_keep", "yes")
                }
                _ => ("auth_admin_keep", "auth_admin_keep", "auth_admin_keep"),
            };
            let body =
                policy.split(&format!("<action id=\"{id}\">")).nth(1).unwrap().split("</action>").next().unwrap();
            for (kind, value) in [("any", any), ("inactive", inactive), ("active", active)] {
                assert!(
                    body.contains(&format!("<allow_{kind}>{value}</allow_{kind}>")),
                    "{id}: {kind} should be {value}"
                );
            }
        }
    }
}
