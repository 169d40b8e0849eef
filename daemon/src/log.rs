//! The daemon's own log: the newest records, for `GetLog`, and those to come, for `LogEntry`.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proxyvpn_dbus::types::LogRecord;
use tokio::sync::broadcast;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, Filter};

/// Most bytes of a message; the rest is cut.
pub const MAX_MESSAGE: usize = 1024;
/// Records that a slow follower may lag behind before it loses some.
const BACKLOG: usize = 256;

/// A bounded ring of records. Clones share it. It is a [`Layer`]: `registry().with(log.clone().filtered())`.
#[derive(Debug, Clone)]
pub struct Log(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    capacity: usize,
    verbose: AtomicBool,
    ring: Mutex<VecDeque<LogRecord>>,
    followers: broadcast::Sender<LogRecord>,
}

impl Log {
    /// Keeps the newest `capacity` records.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Shared {
            capacity,
            verbose: AtomicBool::new(false),
            ring: Mutex::new(VecDeque::with_capacity(capacity)),
            followers: broadcast::channel(BACKLOG).0,
        }))
    }

    /// The newest `count` records, oldest first; 0 means all that are kept.
    #[must_use]
    pub fn recent(&self, count: usize) -> Vec<LogRecord> {
        let ring = self.0.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = if count == 0 { 0 } else { ring.len().saturating_sub(count) };
        ring.iter().skip(skip).cloned().collect()
    }

    /// Records from now on. A receiver that lags loses the oldest.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<LogRecord> {
        self.0.followers.subscribe()
    }

    /// [`Self::recent`] and [`Self::subscribe`] at one moment: no record is missed or twice.
    #[must_use]
    pub fn follow(&self, count: usize) -> (Vec<LogRecord>, broadcast::Receiver<LogRecord>) {
        let ring = self.0.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = if count == 0 { 0 } else { ring.len().saturating_sub(count) };
        (ring.iter().skip(skip).cloned().collect(), self.subscribe())
    }

    /// Whether our own debug records are kept too. Gives what was set before.
    pub fn set_verbose(&self, verbose: bool) -> bool {
        self.0.verbose.swap(verbose, Ordering::Relaxed)
    }

    /// Adds a record.
    pub fn push(&self, record: LogRecord) {
        let mut ring = self.0.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.len() == self.0.capacity {
            ring.pop_front();
        }
        ring.push_back(record.clone());
        // Nobody listens: fine. Sent under the lock, so that `follow` sees each record once.
        let _ = self.0.followers.send(record);
    }

    /// The layer with its filter: info and above; our own debug records while verbose.
    pub fn filtered<S>(self) -> impl Layer<S>
    where
        S: Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    {
        let filter = Verbosity(Arc::clone(&self.0));
        self.with_filter(filter)
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let mut message = text.message;
        message.push_str(&text.fields);
        self.push(LogRecord {
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX)),
            level: event.metadata().level().as_str().to_ascii_lowercase(),
            target: event.metadata().target().to_owned(),
            message: clean(&message),
        });
    }
}

/// Level filter that can change while the daemon runs.
struct Verbosity(Arc<Shared>);

impl<S> Filter<S> for Verbosity {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        *metadata.level() <= Level::INFO
            || (*metadata.level() == Level::DEBUG
                && metadata.target().starts_with("proxyvpn")
                && self.0.verbose.load(Ordering::Relaxed))
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        use tracing::subscriber::Interest;
        match *metadata.level() {
            level if level <= Level::INFO => Interest::always(),
            Level::DEBUG => Interest::sometimes(),
            _ => Interest::never(),
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }
}

/// `message` first, then `name=value` of the other fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut chain = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            let _ = write!(chain, ": {error}");
            cause = error.source();
        }
        self.record_str(field, &chain);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let _ = write!(self.fields, " {}={value:?}", field.name());
        }
    }
}

/// One line of at most [`MAX_MESSAGE`] bytes: parts of it come from the network, and it is shown on terminals.
fn clean(message: &str) -> String {
    let mut line = String::with_capacity(message.len().min(MAX_MESSAGE));
    for c in message.chars() {
        let escaped: &str = &if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
        if line.len() + escaped.len() + "…".len() > MAX_MESSAGE {
            line.push('…');
            break;
        }
        line.push_str(escaped);
    }
    line
}

/// Lets `burst` records through in each `period`, for what a packet or a client can trigger. Made for statics:
/// `static LIMIT: RateLimit = RateLimit::new(5, Duration::from_secs(10));`
/// `if let Some(suppressed) = LIMIT.pass() { tracing::warn!(suppressed, "…") }`
#[derive(Debug)]
pub struct RateLimit {
    burst: u64,
    period: Duration,
    window: Mutex<Option<Instant>>,
    used: AtomicU64,
}

impl RateLimit {
    /// `burst` records in each `period`.
    #[must_use]
    pub const fn new(burst: u64, period: Duration) -> Self {
        Self { burst, period, window: Mutex::new(None), used: AtomicU64::new(0) }
    }

    /// Whether a record may be written now: how many were not since the last one, or `None`.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut suppressed = 0;
        if window.is_none_or(|start| now.duration_since(start) >= self.period) {
            *window = Some(now);
            suppressed = self.used.swap(0, Ordering::Relaxed).saturating_sub(self.burst);
        }
        (self.used.fetch_add(1, Ordering::Relaxed) < self.burst).then_some(suppressed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use proxyvpn_engine::secret::Secret;
    use tracing_subscriber::layer::SubscriberExt as _;

    fn logged(write: impl FnOnce(&Log)) -> Vec<LogRecord> {
        let log = Log::new(3);
        let subscriber = tracing_subscriber::registry().with(log.clone().filtered());
        tracing::subscriber::with_default(subscriber, || write(&log));
        log.recent(0)
    }

    #[test]
    fn the_ring_keeps_the_newest_records() {
        let records = logged(|log| {
            for number in 0..5 {
                tracing::info!(number, "record");
            }
            assert_eq!(log.recent(1).len(), 1);
        });
        let messages: Vec<_> = records.iter().map(|record| record.message.as_str()).collect();
        assert_eq!(messages, ["record number=2", "record number=3", "record number=4"]);
        assert_eq!(records[0].level, "info");
        assert_eq!(records[0].target, "proxyvpnd::log::tests");
        assert!(records[0].time > 1_600_000_000_000_000, "microseconds since 1970");
    }

    #[test]
    fn debug_records_are_kept_only_while_verbose() {
        let records = logged(|log| {
            tracing::debug!("before");
            log.set_verbose(true);
            tracing::debug!("while");
            tracing::debug!(target: "zbus", "of a library");
            log.set_verbose(false);
            tracing::debug!("after");
        });
        assert_eq!(records.iter().map(|record| record.message.as_str()).collect::<Vec<_>>(), ["while"]);
    }

    #[test]
    fn a_record_is_one_bounded_line_without_secrets() {
        let records = logged(|_| {
            tracing::warn!("line\nline \x1b[31m{}", "ü".repeat(4096));
            let error = zbus::Error::Connection(
                Arc::new(std::io::ErrorKind::NotFound.into()),
                Box::new("unix:path=/x".try_into().unwrap()),
            );
            tracing::warn!(error = &error as &dyn std::error::Error, "bus");
            tracing::warn!(password = ?Secret::new("hunter2".to_owned()), "auth");
        });
        assert!(records[0].message.starts_with("line\\nline \\u{1b}[31mü"));
        assert!(records[0].message.ends_with('…') && records[0].message.len() <= MAX_MESSAGE);
        assert!(records[1].message.ends_with(": entity not found"), "the causes too: {}", records[1].message);
        assert_eq!(records[2].message, "auth password=Secret(…)");
    }

    #[test]
    fn a_follower_gets_each_record_once() {
        let log = Log::new(10);
        let record = |message: &str| LogRecord {
            time: 0,
            level: "info".to_owned(),
            target: String::new(),
            message: message.to_owned(),
        };
        log.push(record("a"));
        let (recent, mut next) = log.follow(0);
        log.push(record("b"));
        assert_eq!(recent, [record("a")]);
        assert_eq!(next.try_recv().unwrap(), record("b"));
        assert!(next.try_recv().is_err());
    }

    #[test]
    fn the_rate_limit_counts_what_it_keeps_back() {
        let limit = RateLimit::new(2, Duration::from_secs(10));
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        let passed: Vec<_> = [start; 5].into_iter().chain([later; 3]).map(|now| limit.pass_at(now)).collect();
        assert_eq!(passed, [Some(0), Some(0), None, None, None, Some(3), Some(0), None]);
    }
}
