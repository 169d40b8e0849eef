//! `org.proxyvpn1.TorVm`. The doc comments go into the introspection; `docs/dbus.md` says more.

use std::sync::Arc;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Bootstrap, Circuit};
use proxyvpn_torvm::config::{Bridge, MAX_BRIDGES, Transport};
use zbus::ObjectServer;

use super::manager::{ACCEPT, short, tell};
use super::profiles::Profiles;
use crate::machine::{Command, Handle};

/// The object at `/org/proxyvpn1/torvm`.
#[derive(Debug)]
pub(super) struct TorVm {
    pub(super) handle: Handle,
    pub(super) profiles: Arc<Profiles>,
}

/// What the torvm backend has beyond the other.
#[zbus::interface(name = "org.proxyvpn1.TorVm")]
impl TorVm {
    /// Connections from now on take other ways through the Tor network.
    async fn new_identity(&self) -> Result<(), Error> {
        tell(&self.handle, ACCEPT, Command::NewIdentity).await?
    }

    /// The ways through the Tor network.
    async fn circuits(&self) -> Result<Vec<Circuit>, Error> {
        tell(&self.handle, ACCEPT, Command::Circuits).await?
    }

    /// Sets transport and bridges of an imported profile, from its next connection on. Without lines it has none.
    async fn set_bridges(
        &self,
        profile: &str,
        transport: &str,
        lines: Vec<String>,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<(), Error> {
        short(profile)?;
        let (transport, bridges) = read(transport, &lines)?;
        let name = profile.to_owned();
        self.profiles.with_store(move |store| store.set_bridges(&name, &bridges, transport)).await?;
        self.profiles.sync(server).await
    }

    /// How far Tor is: percent, tag, summary, warning, reason, hint.
    #[zbus(property)]
    fn bootstrap(&self) -> Bootstrap {
        self.handle.view.borrow().bootstrap.clone()
    }

    /// How the virtual machine runs: `kvm`, `tcg` or empty.
    #[zbus(property)]
    fn accelerator(&self) -> &'static str {
        self.handle.view.borrow().accelerator.0
    }

    /// Why it runs so.
    #[zbus(property)]
    fn accelerator_reason(&self) -> String {
        self.handle.view.borrow().accelerator.1.clone()
    }

    /// How Tor's bridges are reached: `none`, `obfs4`, `meek`, `snowflake` or empty.
    #[zbus(property)]
    fn transport(&self) -> &'static str {
        self.handle.view.borrow().transport
    }
}

/// Checks what the caller wants before any file is touched.
fn read(transport: &str, lines: &[String]) -> Result<(Transport, Vec<Bridge>), Error> {
    if lines.len() > MAX_BRIDGES {
        return Err(Error::LimitExceeded(format!("there are more than {MAX_BRIDGES} bridges")));
    }
    let bad = |cause: &dyn std::fmt::Display| Error::InvalidOption(cause.to_string());
    let transport: Transport = transport.parse().map_err(|error| bad(&error))?;
    let read = |(index, line): (usize, &String)| {
        let bridge: Bridge = line.parse().map_err(|error| bad(&format_args!("bridge {}: {error}", index + 1)))?;
        if bridge.transport() == transport {
            return Ok(bridge);
        }
        Err(bad(&format_args!(
            "bridge {} is not reached by the transport {transport}, but {}",
            index + 1,
            bridge.transport()
        )))
    };
    let bridges = lines.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
    if bridges.is_empty() && transport != Transport::None {
        return Err(bad(&format_args!("the transport {transport} needs bridges")));
    }
    Ok((transport, bridges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_are_checked_before_a_file_is_touched() {
        let obfs4 = "obfs4 192.0.2.1:443 cert=a";
        let texts = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>();
        for (transport, lines, says) in [
            ("none", vec![], None),
            ("none", vec!["192.0.2.1:443"], None),
            ("obfs4", vec![obfs4], None),
            ("obfs4", vec![], Some("needs bridges")),
            ("snowflake", vec![], Some("needs bridges")),
            ("snowflake", vec!["snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b"], None),
            (
                "snowflake",
                vec!["snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b log=/x"],
                Some("log= is not known"),
            ),
            ("x\ny", vec![], Some("is no transport")),
            ("none", vec!["192.0.2.1:443", obfs4], Some("bridge 2 is not reached by the transport none, but obfs4")),
            ("obfs4", vec![obfs4, "obfs4 x"], Some("bridge 2: ")),
            ("obfs4", vec!["obfs4 192.0.2.1:443 cert=a\nLog debug file /x"], Some("not of plain words")),
            ("obfs4", vec![obfs4; MAX_BRIDGES + 1], Some("more than 16")),
        ] {
            match (read(transport, &texts(&lines)), says) {
                (Ok((_, bridges)), None) => assert_eq!(bridges.len(), lines.len()),
                (Err(Error::InvalidOption(text) | Error::LimitExceeded(text)), Some(says)) => {
                    assert!(text.contains(says), "{text}");
                }
                (got, want) => assert_eq!(format!("{got:?}"), format!("{want:?}"), "{transport} {lines:?}"),
            }
        }
    }
}
