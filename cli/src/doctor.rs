//! `doctor`: numbered checks, the local ones first, then the daemon's.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use proxyvpn_dbus::names;
use proxyvpn_dbus::types::Check;
use serde::Serialize;
use zbus::fdo::DBusProxy;
use zbus::names::BusName;
use zbus::proxy::CacheProperties;

use crate::agent::Agent;
use crate::args::{Plan, Settings};
use crate::bus::{AUTHENTICATED, Bus, REPLY, bounded};
use crate::exit::{Exit, Failure, Outcome};
use crate::options::Password;
use crate::text;

/// Bus name of polkitd.
const POLKIT: &str = "org.freedesktop.PolicyKit1";
/// How long the daemon's checks may take, beyond a password that somebody types.
const PROBES: Duration = Duration::from_secs(120);

fn check(code: &str, outcome: &str, text: impl Into<String>, remedy: &str) -> Check {
    Check { code: code.to_owned(), outcome: outcome.to_owned(), text: text.into(), remedy: remedy.to_owned() }
}

/// A failed check out of a failed call.
fn failed(code: &str, failure: &Failure) -> Check {
    check(code, "failed", &*failure.cause, &failure.advice)
}

/// `doctor`.
pub(crate) async fn doctor(args: &Plan) -> Outcome {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        checks: &'a [Check],
    }
    args.settings.check(args.profile.as_deref())?;
    let checks = checks(args).await?;
    if args.output.json {
        text::json(&Output { version: 1, checks: &checks })?;
    } else {
        text::out(&describe(&checks))?;
    }
    let failed = checks.iter().any(|check| !matches!(check.outcome.as_str(), "ok" | "warning" | "skipped"));
    Ok(if failed { Exit::Failure } else { Exit::Ok })
}

async fn checks(args: &Plan) -> Result<Vec<Check>, Failure> {
    let mut checks = Vec::new();
    let skip = |code: &str, what: &str| check(code, "skipped", format!("{what}: needs the system bus"), "");
    match Bus::open().await {
        Err(failure) => {
            checks.push(failed("system-bus", &failure));
            checks.push(skip("service-installed", "proxyvpnd on the bus"));
            checks.push(skip("daemon", "proxyvpnd answers"));
            checks.push(skip("polkit", "polkit"));
            checks.push(tun_node(Path::new("/dev/net/tun")));
        }
        Ok(bus) => {
            checks.push(check("system-bus", "ok", "the system bus answers", ""));
            let names = Names::read(&bus).await?;
            checks.push(if names.has(names::BUS) {
                check("service-installed", "ok", "proxyvpnd is installed as a service of the bus", "")
            } else {
                check(
                    "service-installed",
                    "failed",
                    "the bus knows no service org.proxyvpn1: proxyvpnd is not installed",
                    "install proxyvpn (scripts/install.sh)",
                )
            });
            let answer = bounded(REPLY, async { Ok(bus.manager.version().await?) }).await;
            let answers = answer.is_ok();
            checks.push(match answer {
                Ok(version) if version == env!("CARGO_PKG_VERSION") => {
                    check("daemon", "ok", format!("proxyvpnd {version} answers"), "")
                }
                Ok(version) => check(
                    "daemon",
                    "warning",
                    format!("proxyvpnd {version} answers, proxyctl is {}", env!("CARGO_PKG_VERSION")),
                    "install both from the same package, then restart proxyvpnd",
                ),
                Err(failure) => failed("daemon", &failure),
            });
            checks.push(if names.has(POLKIT) {
                check("polkit", "ok", "polkit is there", "")
            } else {
                check(
                    "polkit",
                    "failed",
                    "polkit is not there: the daemon refuses everything that needs authorisation",
                    "install the package polkitd (or policykit-1), then start polkit.service",
                )
            });
            checks.push(tun_node(Path::new("/dev/net/tun")));
            if answers {
                checks.extend(ask_daemon(&bus, args).await?);
            } else {
                checks.push(check("diagnose", "skipped", "the daemon's own checks: it does not answer", ""));
            }
        }
    }
    Ok(checks)
}

async fn ask_daemon(bus: &Bus, args: &Plan) -> Result<Vec<Check>, Failure> {
    let profile = match args.settings.profile(args.profile.as_deref(), bus).await {
        Ok(profile) => profile,
        // Without a choice there are still the checks that need no upstream.
        Err(failure) if failure.exit == Exit::Usage => String::new(),
        Err(failure) => return Ok(vec![failed("diagnose", &failure)]),
    };
    let options = options(&args.settings).await?;
    let _agent = Agent::start();
    Ok(match bounded(AUTHENTICATED.max(PROBES), bus.manager.diagnose(&profile, options)).await {
        Ok(checks) => checks,
        Err(failure) => vec![failed("diagnose", &failure)],
    })
}

async fn options(settings: &Settings) -> Result<crate::options::Options, Failure> {
    settings.options(Password::Read).await
}

/// The names on the bus: those that have an owner and those that can be activated.
struct Names(Vec<String>);

impl Names {
    async fn read(bus: &Bus) -> Result<Self, Failure> {
        bounded(REPLY, async {
            let proxy = DBusProxy::builder(&bus.connection).cache_properties(CacheProperties::No).build().await?;
            let owned = proxy.list_names().await.map_err(zbus::Error::from)?;
            let activatable = proxy.list_activatable_names().await.map_err(zbus::Error::from)?;
            Ok(Self(owned.iter().chain(&activatable).map(|name| BusName::from(name.clone()).to_string()).collect()))
        })
        .await
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|known| known == name)
    }
}

fn tun_node(path: &Path) -> Check {
    match path.metadata() {
        Ok(metadata) if metadata.file_type().is_char_device() => {
            check("tun-node", "ok", format!("{} exists", path.display()), "")
        }
        Ok(_) => check(
            "tun-node",
            "failed",
            format!("{} is not a device", path.display()),
            "remove it, then run: modprobe tun",
        ),
        Err(error) => check(
            "tun-node",
            "failed",
            format!("{}: {error}", path.display()),
            "run: modprobe tun (in a container, let its manager pass the device in)",
        ),
    }
}

fn describe(checks: &[Check]) -> String {
    let mut lines = String::new();
    for (index, check) in checks.iter().enumerate() {
        let remark = text::line(&check.text);
        lines.push_str(&format!("{:>3}. {:<8}{remark}\n", index + 1, text::line(&check.outcome)));
        if !check.remedy.is_empty() && check.outcome != "ok" {
            lines.push_str(&format!("             remedy: {}\n", text::line(&check.remedy.replace('\n', " "))));
        }
    }
    let count = |outcome: &str| checks.iter().filter(|check| check.outcome == outcome).count();
    lines.push_str(&format!(
        "{} ok, {} warning, {} failed, {} skipped\n",
        count("ok"),
        count("warning"),
        count("failed"),
        count("skipped")
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_has_its_remedy() {
        let text = describe(&[
            check("a", "ok", "fine", "not shown"),
            check("b", "failed", "bad\x1b", "do\nthis"),
            check("c", "skipped", "not tried", ""),
        ]);
        assert_eq!(
            text,
            "  1. ok      fine\n  2. failed  bad\\x1b\n             remedy: do this\n  3. skipped not tried\n\
             1 ok, 0 warning, 1 failed, 1 skipped\n"
        );
    }

    #[test]
    fn the_tun_node_must_be_a_device() {
        assert_eq!(tun_node(Path::new("/dev/null")).outcome, "ok");
        assert_eq!(tun_node(Path::new("/")).outcome, "failed");
        assert_eq!(tun_node(Path::new("/nonexistent")).outcome, "failed");
    }
}
