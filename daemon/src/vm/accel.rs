//! Whether the processor (KVM) or QEMU (TCG) runs the guest's instructions. That there is a `/dev/kvm` says little: on a virtual
//! machine a guest may not run one instruction under it. So the guest itself must report, and what failed is remembered.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxyvpn_torvm::launch::Accelerator;
use serde::{Deserialize, Serialize};

use crate::lines::clean;
use crate::record;

/// How long the guest has under KVM until it reports; it takes it less than a second.
pub(super) const PROOF_TIME: Duration = Duration::from_secs(5);
/// The record's name in the state directory.
pub(super) const RECORD: &str = "kvm.json";
/// KVM is tried again after this time: what failed may have been the load.
const MEMORY: u64 = 24 * 3600;
/// Characters of a remembered text.
const MAX_TEXT: usize = 512;

/// What is used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Why, for people.
    pub reason: String,
    /// QEMU's version.
    pub qemu: String,
}

/// That the guest did not run under KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Failure {
    version: u32,
    /// Release of the host's kernel.
    kernel: String,
    /// QEMU's version; empty when it was not known.
    qemu: String,
    /// What happened, for people.
    cause: String,
    /// When, in seconds since 1970-01-01 UTC.
    at: u64,
}

impl Failure {
    pub(super) fn new(qemu: &str, cause: &str) -> Self {
        Self { version: 1, kernel: kernel(), qemu: qemu.to_owned(), cause: cause.to_owned(), at: now() }
    }

    /// What is remembered at `path`; nothing when that can't be read: KVM is tried then.
    pub(super) fn recall(path: &Path) -> Option<Self> {
        let bytes = match record::read(path) {
            Ok(bytes) => bytes?,
            Err(error) => {
                tracing::warn!("what is remembered of KVM is not believed: {error}");
                return None;
            }
        };
        let mut failure: Self = serde_json::from_slice(&bytes).ok().filter(|failure: &Self| failure.version == 1)?;
        failure.cause = clean(&failure.cause, MAX_TEXT);
        Some(failure)
    }

    /// Remembers it. Without, KVM is tried again at the next start, and costs some seconds.
    pub(super) fn remember(&self, path: &Path) {
        let written = serde_json::to_vec(self).map_err(Into::into).and_then(|bytes| record::write(path, &bytes));
        if let Err(error) = written {
            tracing::warn!("that KVM does not work can't be remembered: {error}");
        }
    }
}

/// What is tried first, and the reason for that. Nothing `wanted`: KVM where the guest runs under it, else TCG.
pub(super) fn first(wanted: Option<Accelerator>, remembered: Option<&Failure>) -> (Accelerator, String) {
    choose(wanted, remembered, &kernel(), now())
}

fn choose(wanted: Option<Accelerator>, remembered: Option<&Failure>, kernel: &str, now: u64) -> (Accelerator, String) {
    match (wanted, remembered) {
        (Some(Accelerator::Tcg), _) => (Accelerator::Tcg, "emulation, as configured".to_owned()),
        (Some(Accelerator::Kvm), _) => (Accelerator::Kvm, "KVM, as configured".to_owned()),
        (None, Some(failure)) if failure.holds(kernel, now) => (
            Accelerator::Tcg,
            format!("emulation, since the virtual machine did not start with KVM before: {}", failure.cause),
        ),
        (None, _) => (Accelerator::Kvm, "KVM, and the virtual machine has started with it".to_owned()),
    }
}

/// The reason for TCG when KVM was tried.
pub(super) fn fallback(cause: &str) -> String {
    format!("emulation, since the virtual machine does not start with KVM: {cause}")
}

impl Failure {
    /// A time to come is of a clock that was wrong.
    fn holds(&self, kernel: &str, now: u64) -> bool {
        self.kernel == kernel && self.at <= now && now - self.at < MEMORY
    }

    /// Whether QEMU is another one than then, so that KVM is worth another try.
    pub(super) fn outdated(&self, qemu: &str) -> bool {
        !self.qemu.is_empty() && self.qemu != qemu
    }
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn what_is_tried_first() {
        let failure =
            Failure { version: 1, kernel: "6.1".into(), qemu: "7.2".into(), cause: "silence".into(), at: 1_000_000 };
        let cases = [
            (None, None, "6.1", 1_000_000, Accelerator::Kvm, "has started"),
            (None, Some(&failure), "6.1", 1_000_000, Accelerator::Tcg, "before: silence"),
            (None, Some(&failure), "6.2", 1_000_000, Accelerator::Kvm, "has started"),
            (None, Some(&failure), "6.1", 1_000_000 + MEMORY, Accelerator::Kvm, "has started"),
            (None, Some(&failure), "6.1", 999_999, Accelerator::Kvm, "has started"),
            (Some(Accelerator::Kvm), Some(&failure), "6.1", 1_000_000, Accelerator::Kvm, "as configured"),
            (Some(Accelerator::Tcg), None, "6.1", 1_000_000, Accelerator::Tcg, "as configured"),
        ];
        for (wanted, remembered, kernel, now, accelerator, words) in cases {
            let (chosen, reason) = choose(wanted, remembered, kernel, now);
            assert_eq!(chosen, accelerator, "{wanted:?} {kernel} {now}");
            assert!(reason.contains(words), "{reason}");
        }
        assert!(failure.outdated("8.0") && !failure.outdated("7.2"));
    }

    #[test]
    fn a_failure_is_remembered_and_a_bad_record_is_none() {
        let dir = TestDir::new("accel");
        let path = dir.path(RECORD);
        assert_eq!(Failure::recall(&path), None);
        let failure = Failure::new("7.2", "silence");
        failure.remember(&path);
        assert_eq!(Failure::recall(&path), Some(failure.clone()));
        assert_eq!(first(None, Some(&failure)).0, Accelerator::Tcg);
        for bad in ["", "{}", r#"{"version":2,"kernel":"","qemu":"","cause":"","at":0}"#] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(Failure::recall(&path), None, "{bad}");
        }
    }
}
