//! Before the SSH session that proxyctl runs in is cut, somebody must say yes.

use std::io::{self, BufRead as _, Write as _};

use crate::agent::interactive;
use crate::args::Risk;
use crate::bus::{Bus, take};
use crate::exit::{Exit, Failure};
use crate::text;

/// Asks when the profile does not keep replies of connections from outside. An ad-hoc connection keeps them.
pub(crate) async fn ask(bus: &Bus, profile: &str, accepted: &[Risk]) -> Result<(), Failure> {
    let Some(session) = std::env::var_os("SSH_CONNECTION").filter(|session| !session.is_empty()) else { return Ok(()) };
    if profile.is_empty() || accepted.contains(&Risk::LoseSsh) {
        return Ok(());
    }
    // A profile that is not there is for Connect to say.
    let Some((_, mut properties)) = bus.profiles().await?.into_iter().find(|(name, _)| name == profile) else {
        return Ok(());
    };
    if keeps_replies(&take::<String>(&mut properties, "Text")?) {
        return Ok(());
    }
    let session = session.to_string_lossy();
    let from = session.split_whitespace().next().unwrap_or_default();
    let risk = format!(
        "this session came over SSH from {}, and the profile {} does not answer connections from outside: connecting cuts it",
        text::line(from),
        text::line(profile)
    );
    let refused = Failure::new(Exit::Failure, &*risk).advise(
        "Not connected. --accept-risk=lose-ssh connects all the same; inbound-replies = true keeps the session.",
    );
    if !interactive() {
        return Err(refused);
    }
    let _ = write!(io::stderr().lock(), "proxyctl: {risk}\nConnect all the same? [y/N] ");
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::new(Exit::Failure, "not connected"))
}

/// `protect.inbound-replies` of a profile's text, true by default; a text that cannot be read keeps nothing for sure.
fn keeps_replies(text: &str) -> bool {
    text.parse::<toml::Table>().is_ok_and(|profile| {
        profile
            .get("protect")
            .and_then(|protect| protect.get("inbound-replies"))
            .is_none_or(|keeps| keeps.as_bool() == Some(true))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_kept_unless_the_profile_says_otherwise() {
        assert!(keeps_replies("backend = \"proxy\"\n"));
        assert!(keeps_replies("[protect]\nkillswitch = true\n"));
        assert!(keeps_replies("[protect]\ninbound-replies = true\n"));
        assert!(!keeps_replies("[protect]\ninbound-replies = false\n"));
        assert!(!keeps_replies("protect = { inbound-replies = false }\n"));
        assert!(!keeps_replies("[protect\n"));
    }
}
