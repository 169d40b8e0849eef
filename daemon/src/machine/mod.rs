//! The states of the connection: policy, without effects of its own.
//!
//! One state per file, each with one method that runs it and returns the next. Every order is matched in every state.
//!
//! - [`command`]: what the machine is told and what it shows
//! - [`world`]: the effects, as a trait
//! - [`phase`]: the phases of an attempt
//! - [`failure`]: what went wrong, in the user's words
//! - [`intent`]: what is wanted, on disk
//! - [`lockdown`]: whether there may be network without a connection, on disk
//! - `context`, `disconnected`, `connecting`, `connected`, `blocked`, `disconnecting`: the states

mod blocked;
pub mod command;
mod connected;
mod connecting;
mod context;
mod disconnected;
mod disconnecting;
pub mod failure;
pub mod intent;
pub mod lockdown;
#[cfg(test)]
mod model;
pub mod phase;
#[cfg(test)]
mod tests;
pub mod world;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::{HealthItem, Reason, State};
use tokio::sync::{mpsc, watch};

use blocked::Blocked;
pub use command::{Command, Handle, Request, View};
use connected::Connected;
use connecting::Connecting;
use context::Context;
use disconnected::Disconnected;
use disconnecting::Disconnecting;
pub use failure::Failure;
use intent::{Intent, IntentFile};
use lockdown::LockdownFiles;
pub use phase::{Ending, Phase};
use world::World;

/// Commands that may wait; more are refused by the service.
const WAITING: usize = 32;

/// A state with what it needs.
enum Stage {
    Disconnected(Disconnected),
    Connecting(Connecting),
    Connected(Connected),
    Blocked(Blocked),
    Disconnecting(Disconnecting),
}

/// The machine before it runs.
#[derive(Debug)]
pub struct Machine {
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<View>,
    standing: Vec<HealthItem>,
    intent: IntentFile,
    /// What that says.
    wanted: Intent,
    autoconnect: Option<Request>,
}

impl Machine {
    /// A machine and the service's end of it. `standing` is what is not as it should be for as long as it runs. It will go on with
    /// what `intent` says was wanted when the last daemon ended, else connect `autoconnect`, else clean up what may be left.
    #[must_use]
    pub fn new(standing: Vec<HealthItem>, intent: IntentFile, autoconnect: Option<Request>) -> (Self, Handle) {
        let wanted = intent.read();
        // Whoever asks before it runs is not told that nothing is wanted.
        let state = match (&wanted, &autoconnect) {
            (Intent::Nothing, None) => State::Disconnected,
            (Intent::Profile(_) | Intent::Unreadable(_), _) | (Intent::Nothing, Some(_)) => State::Connecting,
        };
        let (sender, commands) = mpsc::channel(WAITING);
        let first = View { state, since: context::now(), health: standing.clone(), ..View::default() };
        let (view, receiver) = watch::channel(first);
        (Self { commands, view, standing, intent, wanted, autoconnect }, Handle { commands: sender, view: receiver })
    }

    /// Runs until `shutdown` turns true and everything is taken away. Under lockdown nothing that it does opens.
    pub async fn run<W: World>(self, world: W, lockdown: LockdownFiles, shutdown: watch::Receiver<bool>) {
        let inspector = world.inspector();
        let view = (self.view, self.standing);
        let mut context = Context::new(world, inspector, self.commands, shutdown, view, (self.intent, lockdown));
        context.recall_lockdown().await;
        let mut stage = match (self.wanted, self.autoconnect) {
            (Intent::Profile(profile), _) => {
                tracing::info!(profile = profile.name, "going on with the connection that was wanted before");
                Stage::Connecting(Connecting::again(Request { profile: *profile, password: None }, 0))
            }
            (Intent::Unreadable(cause), _) => Stage::Blocked(Blocked::rebuild(
                None,
                Failure::new(
                    ReasonCode::IntentUnreadable,
                    format!(
                        "The record of what was connected cannot be read ({cause}), so traffic is stopped. \
                         Run `proxyctl disconnect`, then connect again"
                    ),
                ),
                0,
            )),
            (Intent::Nothing, Some(request)) => {
                if let Err(error) = context.intent.write(&request.profile) {
                    tracing::error!("cannot record what is wanted: {error}");
                }
                Stage::Connecting(Connecting::again(request, 0))
            }
            (Intent::Nothing, None) => Stage::Disconnecting(Disconnecting { reason: Reason::default() }),
        };
        loop {
            stage = match stage {
                Stage::Disconnected(state) => match state.next(&mut context).await {
                    Some(stage) => stage,
                    None => return,
                },
                Stage::Connecting(state) => state.next(&mut context).await,
                Stage::Connected(state) => state.next(&mut context).await,
                Stage::Blocked(state) => state.next(&mut context).await,
                Stage::Disconnecting(state) => state.next(&mut context).await,
            };
        }
    }
}
