//! `plan` and `connect --dry-run`.

use proxyvpn_dbus::types::PlanStep;
use serde::Serialize;

use crate::agent::Agent;
use crate::args::{Plan, Settings};
use crate::bus::{AUTHENTICATED, Bus, bounded};
use crate::exit::{Exit, Outcome};
use crate::options::Password;
use crate::text;

/// `plan`.
pub(crate) async fn plan(args: &Plan) -> Outcome {
    args.settings.check(args.profile.as_deref())?;
    let bus = Bus::open().await?;
    let profile = args.settings.profile(args.profile.as_deref(), &bus).await?;
    show(&bus, &profile, &args.settings, args.output.json).await
}

/// Shows what a connect would change.
pub(crate) async fn show(bus: &Bus, profile: &str, settings: &Settings, json: bool) -> Outcome {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        profile: &'a str,
        steps: &'a [PlanStep],
    }
    let options = settings.options(Password::Leave).await?;
    let agent = Agent::start();
    let steps = bounded(AUTHENTICATED, bus.manager.plan(profile, options)).await?;
    drop(agent);
    if json {
        text::json(&Output { version: 1, profile, steps: &steps })?;
    } else {
        text::out(&describe(&steps))?;
    }
    Ok(Exit::Ok)
}

fn describe(steps: &[PlanStep]) -> String {
    let mut lines = String::new();
    for step in steps {
        let action = match step.action.as_str() {
            "add" => "+",
            "remove" => "-",
            "set" => "=",
            other => other,
        };
        lines.push_str(&format!(
            "{} {:<8}{}\n",
            text::line(action),
            text::line(&step.layer),
            text::indented(&step.text, 10)
        ));
    }
    lines.push_str(&format!("{} changes; nothing was changed\n", steps.len()));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_its_line() {
        let step = |layer: &str, action: &str, text: &str| PlanStep {
            layer: layer.to_owned(),
            action: action.to_owned(),
            text: text.to_owned(),
        };
        let steps =
            [step("rule", "add", "from all lookup main"), step("nft", "set", "a\nb\x1b"), step("route", "remove", "r")];
        assert_eq!(
            describe(&steps),
            "+ rule    from all lookup main\n= nft     a\n          b\\x1b\n- route   r\n3 changes; nothing was changed\n"
        );
    }
}
