//! Settings of the daemon, `/etc/proxyvpn/proxyvpnd.toml`.

use std::path::Path;

use proxyvpn_engine::config::Limits;
use tracing::level_filters::LevelFilter;

use super::error::{ConfigError, Rejected, Source};
use super::file::{self, FileError, Rules};
use super::raw;

/// Where the settings are. The file may be missing.
pub const PATH: &str = "/etc/proxyvpn/proxyvpnd.toml";

const MAX_FILE: usize = 64 * 1024;
/// Bound on `max-flows`: each flow may take a descriptor and two rings.
const MAX_FLOWS: usize = 1 << 20;

/// Settings of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonConfig {
    /// `log-level`: `error`, `warn`, `info` (default), `debug` or `trace`.
    pub log_level: LevelFilter,
    /// `max-flows`: connections in the tunnel at the same time; the default is the engine's.
    pub max_flows: usize,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self { log_level: LevelFilter::INFO, max_flows: Limits::default().flows }
    }
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
    if let Some(flows) = &raw.max_flows {
        config.max_flows =
            usize::try_from(*flows.get_ref()).ok().filter(|n| (1..=MAX_FLOWS).contains(n)).ok_or_else(|| {
                let message = format!("max-flows = {} is not possible; use 1 to {MAX_FLOWS}", flows.get_ref());
                source.error(Some(flows.span()), Rejected::new(message))
            })?;
    }
    Ok(config)
}
