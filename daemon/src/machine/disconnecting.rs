//! `disconnecting`: everything is taken away; under lockdown, everything is closed.

use std::pin::pin;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::{Reason, State};

use super::context::{Context, Order, Reply, accept, busy};
use super::disconnected::Disconnected;
use super::world::{Inspector, World};
use super::{Ending, Request, Stage};

pub(super) struct Disconnecting {
    pub(super) reason: Reason,
}

impl Disconnecting {
    /// Somebody asked for it.
    pub(super) fn requested() -> Self {
        Self {
            reason: Reason {
                code: ReasonCode::Requested.as_str().to_owned(),
                text: "Disconnected on request".to_owned(),
            },
        }
    }

    pub(super) async fn next<W: World, I: Inspector>(self, context: &mut Context<W, I>) -> Stage {
        // First, so that a daemon that dies half-way finishes the work when it starts instead of connecting.
        if !context.orders.stopping
            && let Err(error) = context.intent.clear()
        {
            tracing::error!("cannot record that nothing is wanted: {error}");
        }
        let mut reason = self.reason;
        let machine = !context.world.facts().accelerator.0.is_empty();
        let first = if machine { Ending::Shutdown } else { Ending::RestoreNetwork };
        let summary = if context.locked() {
            if reason.code == ReasonCode::Requested.as_str() {
                reason.text = "Disconnected on request; lockdown is on, so nothing leaves until you connect".to_owned();
            }
            "Closing the network"
        } else {
            first.summary()
        };
        context.enter(State::Disconnecting, reason.clone(), None);
        context.progress(first.as_str(), 0, summary);
        // The first who wants to connect again gets it when this is done: a call that starts the daemon comes this early.
        let mut next: Option<(Box<Request>, Reply)> = None;
        context.unsettled = {
            let (work, orders) = context.rest();
            let mut work = pin!(work);
            loop {
                tokio::select! {
                    biased;
                    unsettled = &mut work => break unsettled,
                    order = orders.next() => match order {
                        Order::Connect(request, reply) if next.is_none() => next = Some((request, reply)),
                        Order::Connect(_, reply) => busy(reply, "another connection is about to be made"),
                        Order::Reconnect(reply) => busy(reply, "the connection is being taken down"),
                        Order::Lockdown(on, reply) => orders.hold(on, reply),
                        Order::Disconnect(reply) => {
                            accept(reply);
                            if let Some((_, reply)) = next.take() {
                                busy(reply, "somebody disconnected meanwhile");
                            }
                        }
                        Order::Shutdown => {}
                    },
                }
            }
        };
        for item in &context.unsettled {
            tracing::error!(code = item.code, "{}", item.text);
        }
        Stage::Disconnected(Disconnected { reason, next })
    }
}
