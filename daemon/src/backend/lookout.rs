//! What the backend waits for while a connection is wanted, beside its engine: changes of the network, of the machine's DNS
//! servers, and the end of a sleep. And what it remembers of its looks.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt as _;
use proxyvpn_dbus::types::HealthItem;
use tokio::time::{Instant, timeout};
use zbus::message::Type;
use zbus::{Connection, MatchRule, MessageStream};

use super::carrier::item;
use crate::config::watch::Watch as FileWatch;
use crate::net::{Cut, Finding, Network, Watch, Way};
use crate::resolvers::{self, Paths};

/// How long what was put back, and new DNS servers, are shown.
const SHOWN: Duration = Duration::from_secs(600);
/// How old hints about the surroundings may be when something changes; more where it takes long to find them.
const FRESH: Duration = Duration::from_secs(2);
/// To find them takes one part in so many of the time at most.
const SHARE: u32 = 50;
/// Failures in a row until what can't be put back is a fault.
const PATIENCE: u32 = 5;
/// How long after the first failure the next look comes.
const AGAIN: Duration = Duration::from_millis(100);
/// The bus answers at once, or is in trouble.
const BUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Signals that may wait.
const SIGNALS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// What happened around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disturbance {
    /// Somebody changed the network.
    Network,
    /// The files that name the DNS servers changed.
    Resolvers,
    /// The machine woke up.
    Resumed,
}

/// See the module. At rest nothing is waited for.
#[derive(Debug, Default)]
pub(super) struct Lookout {
    watch: Option<Watch>,
    files: Option<Files>,
    sleep: Option<MessageStream>,
    /// Whether it was tried to begin.
    started: bool,
    /// The files that name the DNS servers may have changed, and nobody has looked.
    resolvers_stale: bool,
    /// The way to the upstream is another one, and nobody was told.
    pub(super) moved: bool,
    way: Option<Way>,
    put_back: Option<PutBack>,
    /// The new DNS servers, and when they came.
    followed: Option<(String, Instant)>,
    failures: u32,
    surroundings: Option<Surroundings>,
}

#[derive(Debug)]
struct PutBack {
    count: usize,
    newest: String,
    last: Instant,
}

/// Hints about the surroundings.
#[derive(Debug)]
struct Surroundings {
    found: Vec<Finding>,
    /// When they may be found anew.
    until: Instant,
}

/// The files that name the DNS servers.
#[derive(Debug)]
struct Files {
    folders: Vec<PathBuf>,
    watch: FileWatch,
}

impl Files {
    fn new() -> io::Result<Self> {
        let folders = resolvers::folders(&Paths::default());
        Ok(Self { watch: FileWatch::new(&folders)?, folders })
    }

    async fn changed(&mut self) -> io::Result<()> {
        self.watch.changed().await?;
        // A link may lead elsewhere now.
        if resolvers::folders(&Paths::default()) != self.folders {
            *self = Self::new()?;
        }
        Ok(())
    }
}

impl Lookout {
    /// Begins to wait, before the first change of ours. What can't be watched is seen by the looks of every half minute.
    pub(super) async fn start(&mut self, network: &Network, bus: &Connection) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        self.watch = network
            .watch()
            .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "the network is not watched"))
            .ok();
        self.files = Files::new()
            .inspect_err(|error| tracing::warn!(%error, "changes of the DNS servers are not seen at once"))
            .ok();
        // They were looked for before that.
        self.resolvers_stale = true;
        self.sleep = match timeout(BUS_TIMEOUT, sleep_signals(bus)).await {
            Ok(Ok(signals)) => Some(signals),
            Ok(Err(error)) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the end of a sleep is not seen");
                None
            }
            Err(_) => None,
        };
    }

    /// Somebody should look for the DNS servers.
    pub(super) fn resolvers_changed(&mut self) {
        self.resolvers_stale = true;
    }

    /// Whether this look is for the DNS servers too. Without a watch every one is, and tries to have one again; not the one that its end
    /// brings, so that a watch that fails again and again is no hurry.
    pub(super) fn resolvers_stale(&mut self) -> bool {
        let changed = std::mem::take(&mut self.resolvers_stale);
        if changed || !self.started || self.files.is_some() {
            return changed;
        }
        self.files = Files::new().ok();
        true
    }

    /// Waits for the next disturbance. May be dropped while it waits.
    pub(super) async fn next(&mut self) -> Disturbance {
        let Self { watch, files, sleep, .. } = self;
        let network = async {
            match watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        let resolvers = async {
            if let Some(watched) = files
                && let Err(error) = watched.changed().await
            {
                tracing::warn!(%error, "changes of the DNS servers are not seen at once any more");
                return false;
            } else if files.is_none() {
                std::future::pending::<()>().await;
            }
            true
        };
        tokio::select! {
            biased;
            () = network => Disturbance::Network,
            alive = resolvers => {
                if !alive {
                    self.files = None;
                }
                Disturbance::Resolvers
            }
            () = woken(sleep) => Disturbance::Resumed,
        }
    }

    /// A look has ended that began at `began`, with what was put back and whether some of it could not be. Gives whether that is
    /// a fault by now.
    pub(super) fn looked(&mut self, began: Instant, put_back: &[String], failed: bool) -> bool {
        let now = Instant::now();
        if let Some(newest) = put_back.last() {
            let shown = self.put_back.as_ref().filter(|earlier| now - earlier.last < SHOWN);
            let count = shown.map_or(0, |earlier| earlier.count) + put_back.len();
            self.put_back = Some(PutBack { count, newest: newest.clone(), last: now });
        }
        self.failures = if failed { self.failures.saturating_add(1) } else { 0 };
        if let Some(watch) = &mut self.watch {
            watch.looked(began, !put_back.is_empty());
            if failed && self.failures < PATIENCE {
                watch.again(AGAIN * self.failures);
            }
        }
        self.failures >= PATIENCE
    }

    /// What was found about the way to the upstream. Gives whether it leads somewhere, and elsewhere than before.
    pub(super) fn way(&mut self, way: Way) -> bool {
        let moved = self.way.as_ref().is_some_and(|earlier| *earlier != way);
        let open = way.cut().is_none();
        self.moved |= moved;
        self.way = Some(way);
        moved && open
    }

    /// The upstream has other addresses, and `way` leads to them now: a change from here on is one, even before the first look.
    pub(super) fn another_upstream(&mut self, way: Option<Way>) {
        self.way = way;
        self.surroundings = None;
    }

    /// Why nothing can reach the upstream, as far as is known.
    pub(super) fn cut(&self) -> Option<Cut> {
        self.way.as_ref().and_then(Way::cut)
    }

    /// Whether the hints about the surroundings are to be found anew. If it is too early, there will be another look.
    pub(super) fn surroundings_stale(&mut self) -> bool {
        let wait = self.surroundings.as_ref().map(|hints| hints.until.saturating_duration_since(Instant::now()));
        let wait = wait.filter(|wait| !wait.is_zero());
        if let (Some(watch), Some(wait)) = (&mut self.watch, wait) {
            watch.again(wait);
        }
        wait.is_none()
    }

    /// The hints about the surroundings, which were looked for since `began`.
    pub(super) fn surroundings(&mut self, began: Instant, found: Vec<Finding>) {
        let until = Instant::now() + FRESH.max(began.elapsed() * SHARE);
        self.surroundings = Some(Surroundings { found, until });
    }

    /// The DNS servers are others now.
    pub(super) fn followed(&mut self, servers: String) {
        self.followed = Some((servers, Instant::now()));
    }

    /// What there is to tell.
    pub(super) fn items(&self) -> Vec<HealthItem> {
        let mut items = vec![];
        if self.started && self.watch.is_none() {
            let text = "Changes of the network by other programs are seen within 30 s, not at once";
            items.push(item("not-watched", "warning", text));
        }
        if self.watch.as_ref().is_some_and(Watch::contested) {
            let text = "Another program removes the rules of proxyvpn again and again. They are put back, at most once per second, \
                        and in between traffic can leave that should not. Find it (nft monitor, ip monitor), or disconnect";
            items.push(item("contested", "error", text));
        }
        if let Some(back) = self.put_back.as_ref().filter(|back| back.last.elapsed() < SHOWN) {
            let text = format!(
                "Another program removed or changed what proxyvpn had set; it was put back ({} changes within the last minutes, \
                 the newest: {})",
                back.count, back.newest
            );
            items.push(item("put-back", "warning", text));
        }
        if let Some((servers, _)) = self.followed.as_ref().filter(|(_, since)| since.elapsed() < SHOWN) {
            let text = format!("The machine's DNS servers changed. Now these are asked around the tunnel: {servers}");
            items.push(item("resolvers-changed", "info", text));
        }
        let hints = self.surroundings.iter().flat_map(|hints| &hints.found);
        items.extend(hints.map(|found| item(found.code, found.severity.as_str(), found.text.clone())));
        items
    }
}

/// Signals of logind, before a sleep and after it (org.freedesktop.login1(5)).
async fn sleep_signals(bus: &Connection) -> zbus::Result<MessageStream> {
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender("org.freedesktop.login1")
        .path("/org/freedesktop/login1")
        .interface("org.freedesktop.login1.Manager")
        .member("PrepareForSleep")
        .build()?;
    MessageStream::for_match_rule(rule, bus, Some(SIGNALS)).await
}

/// Waits for the end of a sleep.
async fn woken(signals: &mut Option<MessageStream>) {
    while let Some(stream) = signals {
        match stream.next().await {
            Some(Ok(signal)) if signal.body().deserialize::<bool>() == Ok(false) => return,
            Some(_) => {}
            None => *signals = None,
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_watch_every_look_is_for_the_dns_servers_and_tries_to_have_one() {
        let mut lookout = Lookout::default();
        assert!(!lookout.resolvers_stale(), "nothing is wanted");
        lookout.started = true;
        lookout.resolvers_changed();
        assert!(lookout.resolvers_stale() && lookout.files.is_none(), "not at once after its end");
        assert!(lookout.resolvers_stale() && lookout.files.is_some());
        assert!(!lookout.resolvers_stale(), "the watch tells");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_put_back_is_shown_for_a_while_and_failures_in_a_row_are_a_fault() {
        let mut lookout = Lookout::default();
        let codes = |lookout: &Lookout| -> Vec<String> { lookout.items().into_iter().map(|item| item.code).collect() };
        assert_eq!(codes(&lookout), [""; 0]);
        let lines = ["rule one".to_owned(), "rule two".to_owned()];
        for _ in 0..2 {
            assert!(!lookout.looked(Instant::now(), &lines, false));
        }
        let text = lookout.items().remove(0).text;
        assert!(text.contains("4 changes") && text.contains("rule two"), "{text}");
        tokio::time::advance(SHOWN).await;
        assert_eq!(codes(&lookout), [""; 0]);
        lookout.looked(Instant::now(), &lines, false);
        assert!(lookout.items()[0].text.contains("2 changes"), "what is over is not counted");

        for failure in 1..PATIENCE {
            assert!(!lookout.looked(Instant::now(), &[], true), "{failure}");
        }
        assert!(lookout.looked(Instant::now(), &[], true));
        assert!(!lookout.looked(Instant::now(), &[], false), "one that succeeds ends the row");
    }
}
