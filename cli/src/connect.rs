//! `connect`, `disconnect`, `reconnect`.

use std::collections::HashMap;
use std::time::Duration;

use crate::agent::{Agent, interactive};
use crate::args::{Connect, Wait};
use crate::bus::{AUTHENTICATED, Bus};
use crate::exit::{Exit, Failure, Outcome};
use crate::options::Password;
use crate::status::Snapshot;
use crate::wait::{Goal, Limits, Patience, drive};
use crate::{keep, plan, ssh, text};

impl Wait {
    /// Somebody who types a password has time for it; a script does not wait longer than it said.
    fn limits(&self) -> Limits {
        let patience = self.timeout.map_or(Patience::Progress, |seconds| Patience::Total(Duration::from_secs(seconds)));
        let reply = patience.limit("");
        Limits {
            reply: if interactive() { AUTHENTICATED.max(reply) } else { reply },
            goal: (!self.no_wait).then_some(patience),
        }
    }
}

/// `connect`.
pub(crate) async fn connect(args: &Connect) -> Outcome {
    args.settings.check(args.profile.as_deref())?;
    let bus = Bus::open().await?;
    let profile = args.settings.profile(args.profile.as_deref(), &bus).await?;
    if args.dry_run {
        return plan::show(&bus, &profile, &args.settings, args.json).await;
    }
    ssh::ask(&bus, &profile, &args.accept_risk).await?;
    let options = args.settings.options(Password::Read).await?;
    let agent = Agent::start();
    let begin = text::now();
    let end = drive(&bus, Goal::Connect, args.wait.limits(), bus.manager.connect(&profile, options)).await;
    if args.keep_logs && !matches!(&end, Err(failure) if failure.exit == Exit::NotAuthorised) {
        keep::store(&bus, args.state_dir.as_deref(), begin).await;
    }
    drop(agent);
    end?;
    tell(&bus, args.wait.no_wait).await
}

/// `reconnect`.
pub(crate) async fn reconnect(args: &Wait) -> Outcome {
    let bus = Bus::open().await?;
    let agent = Agent::start();
    drive(&bus, Goal::Reconnect, args.limits(), bus.manager.reconnect()).await?;
    drop(agent);
    tell(&bus, args.no_wait).await
}

/// `disconnect`. To be disconnected already is success.
pub(crate) async fn disconnect(args: &Wait) -> Outcome {
    let bus = Bus::open().await?;
    let agent = Agent::start();
    match drive(&bus, Goal::Disconnect, args.limits(), bus.manager.disconnect(HashMap::new())).await {
        Ok(()) => {}
        Err(failure) if failure.exit == Exit::NotConnected => {
            text::out("already disconnected\n")?;
            return Ok(Exit::Ok);
        }
        Err(failure) => return Err(failure),
    }
    drop(agent);
    if args.no_wait {
        text::out("accepted; proxyctl status --watch shows how it goes\n")?;
        return Ok(Exit::Ok);
    }
    let snapshot = Snapshot::read(&bus).await?;
    snapshot.warn();
    if snapshot.lockdown {
        text::out("disconnected; lockdown is on, so nothing leaves (proxyctl lockdown off opens the network)\n")?;
        return Ok(Exit::Ok);
    }
    if snapshot.state == "disconnected" && snapshot.blocking {
        return Err(Failure::new(Exit::Blocked, "disconnected, but traffic is still blocked")
            .advise("sudo proxyctl rescue opens the network; proxyctl logs says what went wrong."));
    }
    text::out("disconnected\n")?;
    Ok(Exit::Ok)
}

/// Says what there is now.
async fn tell(bus: &Bus, no_wait: bool) -> Outcome {
    if no_wait {
        text::out("accepted; proxyctl status --watch shows how it goes\n")?;
        return Ok(Exit::Ok);
    }
    let snapshot = Snapshot::read(bus).await?;
    snapshot.warn();
    let mut line = "connected".to_owned();
    for (name, value) in [("profile", &snapshot.profile), ("through", &snapshot.upstream), ("device", &snapshot.device)]
    {
        if !value.is_empty() {
            line.push_str(&format!(", {name} {}", text::line(value)));
        }
    }
    text::out(&format!("{line}\n"))?;
    Ok(Exit::Ok)
}
