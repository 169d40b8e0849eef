//! Settings of the daemon, `/etc/proxyvpn/proxyvpnd.toml`.

use std::num::NonZero;
use std::ops::RangeInclusive;
use std::path::Path;

use proxyvpn_engine::config::Limits;
use toml::Spanned;
use tracing::level_filters::LevelFilter;

use super::error::{ConfigError, Rejected, Source};
use super::file::{self, FileError, Rules};
use super::raw;

/// Where the settings are. The file may be missing.
pub const PATH: &str = "/etc/proxyvpn/proxyvpnd.toml";

const MAX_FILE: usize = 64 * 1024;
/// Bound on `max-flows`: each flow may take a descriptor and two rings.
const MAX_FLOWS: usize = 1 << 20;
const MIB: usize = 1024 * 1024;
/// Bounds on `max-memory-mib`: 32 connections' full buffers, and a TiB.
const MIN_MEMORY: usize = 16;
const MAX_MEMORY: usize = MIB;
/// Most queues that are opened unasked.
const DEFAULT_QUEUES: usize = 8;
/// Bound on `queues`: far below the kernel's 256, and each has a thread.
const MAX_QUEUES: usize = 64;

/// Settings of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonConfig {
    /// `log-level`: `error`, `warn`, `info` (default), `debug` or `trace`.
    pub log_level: LevelFilter,
    /// `max-flows`: connections in the tunnel at the same time; the default is the engine's.
    pub max_flows: usize,
    /// `max-memory-mib`: what the connections' buffers may hold; the default is a quarter of the machine's memory, at most 1024.
    pub max_memory_mib: usize,
    /// `queues`: of the tunnel device, each with a thread of its own; the default is half as many as processors, at most 8.
    pub queues: usize,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            log_level: LevelFilter::INFO,
            max_flows: Limits::default().flows,
            max_memory_mib: default_memory(),
            queues: default_queues(),
        }
    }
}

impl DaemonConfig {
    /// What the engine is to keep to.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { flows: self.max_flows, memory: self.max_memory_mib * MIB, ..Limits::default() }
    }
}

/// A quarter of the machine's memory, so that programs have the rest, up to the engine's own default.
fn default_memory() -> usize {
    let info = rustix::system::sysinfo();
    let total = u128::from(info.totalram) * u128::from(info.mem_unit);
    let quarter = usize::try_from(total / 4).unwrap_or(usize::MAX);
    (quarter.min(Limits::default().memory) / MIB).max(MIN_MEMORY)
}

/// One for every two processors that this process may use (affinity and cgroup quota are regarded): programs and the kernel need the
/// others for the same bytes.
fn default_queues() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).clamp(1, DEFAULT_QUEUES)
}

/// Reads the settings; a missing file means the defaults.
///
/// # Errors
/// The file is not root's, others may write it, or its text is wrong.
pub fn load(path: &Path) -> Result<DaemonConfig, ConfigError> {
    load_owned(path, 0)
}

fn load_owned(path: &Path, owner: u32) -> Result<DaemonConfig, ConfigError> {
    let bytes = match file::read(path, Rules { owners: &[owner], max: MAX_FILE, secret: false }) {
        Err(FileError::Missing { .. }) => return Ok(DaemonConfig::default()),
        other => other?,
    };
    parse(&path.to_string_lossy(), &file::text(&bytes, path)?)
}

/// Reads the settings from a text; `file` is what messages call it.
///
/// # Errors
/// The first thing that is wrong, with its line and column.
pub fn parse(file: &str, text: &str) -> Result<DaemonConfig, ConfigError> {
    let source = Source { file, text };
    let raw: raw::Daemon = source.parse()?;
    let mut config = DaemonConfig::default();
    if let Some(level) = &raw.log_level {
        config.log_level = match level.get_ref().as_str() {
            "error" => LevelFilter::ERROR,
            "warn" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            "debug" => LevelFilter::DEBUG,
            "trace" => LevelFilter::TRACE,
            other => {
                let message = format!("\"{other}\" is no log-level; use error, warn, info, debug or trace");
                return Err(source.error(Some(level.span()), Rejected::new(message)));
            }
        };
    }
    for (key, value, range, to) in [
        ("max-flows", &raw.max_flows, 1..=MAX_FLOWS, &mut config.max_flows),
        ("max-memory-mib", &raw.max_memory_mib, MIN_MEMORY..=MAX_MEMORY, &mut config.max_memory_mib),
        ("queues", &raw.queues, 1..=MAX_QUEUES, &mut config.queues),
    ] {
        if let Some(value) = value {
            *to = number(&source, key, value, range)?;
        }
    }
    Ok(config)
}

fn number(
    source: &Source<'_>,
    key: &str,
    value: &Spanned<i64>,
    range: RangeInclusive<usize>,
) -> Result<usize, ConfigError> {
    usize::try_from(*value.get_ref()).ok().filter(|number| range.contains(number)).ok_or_else(|| {
        let message = format!("{key} = {} is not possible; use {} to {}", value.get_ref(), range.start(), range.end());
        source.error(Some(value.span()), Rejected::new(message))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::process::geteuid;

    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn every_key_and_its_errors() {
        assert_eq!(parse("f", "").unwrap(), DaemonConfig::default());
        let config = parse("f", "log-level = \"debug\"\nmax-flows = 100\nmax-memory-mib = 20\nqueues = 3\n").unwrap();
        let expected = DaemonConfig { log_level: LevelFilter::DEBUG, max_flows: 100, max_memory_mib: 20, queues: 3 };
        assert_eq!(config, expected);
        assert_eq!((config.limits().flows, config.limits().memory), (100, 20 << 20));
        for (text, says) in [
            ("log-level = \"loud\"\n", "f:1:13: \"loud\" is no log-level; use error,"),
            ("\nmax-flows = 0\n", "f:2:13: max-flows = 0 is not possible"),
            ("max-flows = 1048577\n", "use 1 to 1048576"),
            ("max-memory-mib = 15\n", "use 16 to 1048576"),
            ("queues = 0\n", "f:1:10: queues = 0 is not possible; use 1 to 64"),
            ("queues = 65\n", "use 1 to 64"),
            ("max-flows = \"many\"\n", "expected a whole number"),
            ("log_level = \"info\"\n", "f:1:1: unknown key `log_level`"),
        ] {
            let error = parse("f", text).unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_missing_file_means_the_defaults_and_a_foreign_one_is_refused() {
        let (dir, own) = (TestDir::new("daemon"), geteuid().as_raw());
        let path = dir.path("proxyvpnd.toml");
        assert_eq!(load_owned(&path, own).unwrap(), DaemonConfig::default());
        std::fs::write(&path, "max-flows = 7\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(load_owned(&path, own).unwrap().max_flows, 7);
        assert!(load_owned(&path, own + 1).unwrap_err().to_string().contains("chown"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(load_owned(&path, own).unwrap_err().to_string().contains("chmod go-w"));
    }
}
