//! `disconnected`: no connection is wanted. The network is as it was, or under lockdown closed.

use std::time::Duration;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Reason, State};
use tokio::time::{MissedTickBehavior, interval};

use super::connecting::Connecting;
use super::context::{Context, Order, Reply, accept, answer, refuse};
use super::disconnecting::Disconnecting;
use super::world::{Inspector, World};
use super::{Failure, Request, Stage};

/// How often the network is compared with what a lockdown applied.
const LOOK: Duration = Duration::from_secs(30);

pub(super) struct Disconnected {
    /// Why the last connection ended or was not made.
    pub(super) reason: Reason,
    /// Who has waited for this to connect.
    pub(super) next: Option<(Box<Request>, Reply)>,
}

impl Disconnected {
    /// After an attempt that changed nothing.
    pub(super) fn after(failure: &Failure) -> Self {
        Self { reason: failure.reason(), next: None }
    }

    pub(super) async fn next<W: World, I: Inspector>(mut self, context: &mut Context<W, I>) -> Option<Stage> {
        // A daemon that is told to end keeps the record: the next one goes on, unless systemd removes it with the unit.
        if !context.orders.stopping
            && let Err(error) = context.intent.clear()
        {
            tracing::error!("cannot record that nothing is wanted: {error}; the daemon will connect when it starts");
        }
        context.enter(State::Disconnected, self.reason.clone(), None);
        context.health(context.unsettled.clone());
        if context.orders.stopping {
            return None;
        }
        // Who gave up waiting does not want it any more.
        let mut first = self.next.take().filter(|(_, reply)| !reply.is_closed());
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.reset();
        loop {
            let order = match first.take() {
                Some((request, reply)) => Order::Connect(request, reply),
                None => tokio::select! {
                    order = context.orders.next() => order,
                    _ = context.world.fault(), if context.lockdown.on => {
                        self.look(context).await;
                        continue;
                    }
                    _ = look.tick(), if context.lockdown.on => {
                        self.look(context).await;
                        continue;
                    }
                },
            };
            match order {
                Order::Connect(request, reply) => {
                    if let Err(error) = context.intent.write(&request.profile) {
                        refuse(reply, Error::Internal(format!("cannot record what is wanted: {error}")));
                        continue;
                    }
                    accept(reply);
                    return Some(Stage::Connecting(Connecting::fresh(*request)));
                }
                Order::Disconnect(reply) | Order::Reconnect(reply) => {
                    refuse(reply, Error::NotConnected("there is no connection".to_owned()));
                }
                Order::Lockdown(on, reply) => {
                    let done = context.set_lockdown(on).await;
                    if done.is_ok() {
                        let unsettled = context.rest().0.await;
                        context.unsettled = unsettled;
                        context.enter(State::Disconnected, self.reason.clone(), None);
                        context.health(context.unsettled.clone());
                    }
                    answer(reply, done);
                }
                // The lock alone stays.
                Order::Shutdown if context.locked() => {
                    return Some(Stage::Disconnecting(Disconnecting { reason: self.reason }));
                }
                Order::Shutdown => return None,
            }
        }
    }

    /// Whether the block of a lockdown is still in force; what others removed is put back.
    async fn look<W: World, I: Inspector>(&mut self, context: &mut Context<W, I>) {
        if !context.unsettled.is_empty() {
            let unsettled = context.rest().0.await;
            context.unsettled = unsettled;
            context.enter(State::Disconnected, self.reason.clone(), None);
        }
        let mut health = context.unsettled.clone();
        health.extend(context.world.health().await);
        context.health(health);
    }
}
