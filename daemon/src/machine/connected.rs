//! `connected`: traffic goes through the upstream.

use std::time::Duration;

use proxyvpn_dbus::types::{Reason, State};
use tokio::time::{MissedTickBehavior, interval};

use super::blocked::Blocked;
use super::connecting::Connecting;
use super::context::{Context, Order, accept, answer, busy};
use super::disconnecting::Disconnecting;
use super::world::{Fault, Inspector, World};
use super::{Request, Stage};

/// How often the network is compared with what was applied though nobody said that it changed.
const HEALTH_INTERVAL: Duration = Duration::from_secs(30);

pub(super) struct Connected {
    request: Request,
}

impl Connected {
    pub(super) fn new(request: Request) -> Self {
        Self { request }
    }

    pub(super) async fn next<W: World, I: Inspector>(self, context: &mut Context<W, I>) -> Stage {
        context.enter(State::Connected, Reason::default(), Some(&self.request));
        tracing::info!(profile = self.request.profile.name, "connected");
        let mut timer = interval(HEALTH_INTERVAL);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = context.orders.next() => match order {
                    Order::Connect(_, reply) => busy(reply, "a connection is there; disconnect first"),
                    Order::Disconnect(reply) => {
                        accept(reply);
                        return Stage::Disconnecting(Disconnecting::requested());
                    }
                    Order::Reconnect(reply) => {
                        accept(reply);
                        return Stage::Connecting(Connecting::again(self.request, 0));
                    }
                    Order::Lockdown(on, reply) => {
                        let done = context.set_lockdown(on).await;
                        answer(reply, done);
                    }
                    Order::Shutdown => return Stage::Disconnecting(Disconnecting::requested()),
                },
                fault = context.world.fault() => match fault {
                    Fault::Upstream(failure) => return Stage::Blocked(Blocked::waiting(self.request, failure)),
                    Fault::Broken(failure) => return Stage::Blocked(Blocked::rebuild(Some(self.request), failure, 0)),
                    Fault::Health => context.look().await,
                    Fault::Uplink | Fault::UpstreamWorking => {}
                },
                _ = timer.tick() => context.look().await,
            }
        }
    }
}
