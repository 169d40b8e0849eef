//! `disconnected`: no connection is wanted, the network is as it was.

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{HealthItem, Reason, State};

use super::connecting::Connecting;
use super::context::{Context, Order, Reply, accept, refuse};
use super::world::{Inspector, World};
use super::{Failure, Request, Stage};

pub(super) struct Disconnected {
    /// Why the last connection ended or was not made.
    pub(super) reason: Reason,
    /// What could not be undone.
    pub(super) leftovers: Vec<String>,
    /// Who has waited for this to connect.
    pub(super) next: Option<(Box<Request>, Reply)>,
}

impl Disconnected {
    /// After an attempt that changed nothing.
    pub(super) fn after(failure: &Failure) -> Self {
        Self { reason: failure.reason(), leftovers: Vec::new(), next: None }
    }

    pub(super) async fn next<W: World, I: Inspector>(self, context: &mut Context<W, I>) -> Option<Stage> {
        // A daemon that is told to end keeps the record: the next one goes on, unless systemd removes it with the unit.
        if !context.orders.stopping
            && let Err(error) = context.intent.clear()
        {
            tracing::error!("cannot record that nothing is wanted: {error}; the daemon will connect when it starts");
        }
        context.enter(State::Disconnected, self.reason, None);
        context.health(
            self.leftovers
                .into_iter()
                .map(|text| HealthItem {
                    code: "not-undone".to_owned(),
                    severity: "error".to_owned(),
                    text: format!("{text}. Run `sudo proxyctl rescue` to try again"),
                })
                .collect(),
        );
        if context.orders.stopping {
            return None;
        }
        // Who gave up waiting does not want it any more.
        let mut first = self.next.filter(|(_, reply)| !reply.is_closed());
        loop {
            let order = match first.take() {
                Some((request, reply)) => Order::Connect(request, reply),
                None => context.orders.next().await,
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
                Order::Shutdown => return None,
            }
        }
    }
}
