//! `connecting`: one phase after the other.

use std::pin::pin;

use proxyvpn_dbus::types::{Reason, State};

use super::blocked::Blocked;
use super::connected::Connected;
use super::context::{Context, Order, accept, busy};
use super::disconnected::Disconnected;
use super::disconnecting::Disconnecting;
use super::world::{Inspector, World};
use super::{Failure, Phase, Request, Stage};

pub(super) struct Connecting {
    request: Request,
    /// Traffic is stopped until this attempt succeeds, and a failure leads to `blocked` instead of back.
    hold: bool,
    /// Attempts in a row that failed before this one.
    attempt: u32,
}

enum Outcome {
    Done(Result<(), Failure>),
    Unwanted,
}

impl Connecting {
    /// A user's attempt: if it fails, the network is given back.
    pub(super) fn fresh(request: Request) -> Self {
        Self { request, hold: false, attempt: 0 }
    }

    /// An attempt to go on with a connection that is wanted already: nothing opens meanwhile.
    pub(super) fn again(request: Request, attempt: u32) -> Self {
        Self { request, hold: true, attempt }
    }

    pub(super) async fn next<W: World, I: Inspector>(self, context: &mut Context<W, I>) -> Stage {
        context.enter(State::Connecting, Reason::default(), Some(&self.request));
        if self.hold {
            if let Err(failure) = context.world.block(Some(&self.request)).await {
                return Stage::Blocked(Blocked::rebuild(Some(self.request), failure, self.attempt));
            }
        } else if context.locked()
            && let Err(failure) = context.world.block(None).await
        {
            return Stage::Disconnecting(Disconnecting { reason: failure.reason() });
        }
        let mut touched = false;
        let mut percent = 0;
        let phases = Phase::of(&self.request.profile);
        for &phase in &phases {
            context.progress(phase.as_str(), percent, phase.summary());
            tracing::debug!(phase = phase.as_str(), "begins");
            touched |= phase.touches_network();
            match self.run(phase, percent, context).await {
                Outcome::Done(Ok(())) => {}
                Outcome::Done(Err(failure)) => return self.failed(failure, touched || context.locked()),
                Outcome::Unwanted => return Stage::Disconnecting(Disconnecting::requested()),
            }
            percent += step(&phases);
        }
        context.remember(&self.request.profile);
        Stage::Connected(Connected::new(self.request))
    }

    async fn run<W: World, I: Inspector>(&self, phase: Phase, percent: u32, context: &mut Context<W, I>) -> Outcome {
        let Context { world, orders, view, .. } = context;
        let mut bootstrap = world.bootstrap();
        let mut work = pin!(world.phase(phase, &self.request));
        let mut unwanted = false;
        loop {
            tokio::select! {
                biased;
                result = &mut work => {
                    return if unwanted { Outcome::Unwanted } else { Outcome::Done(result) };
                }
                Ok(()) = bootstrap.changed() => {
                    let found = bootstrap.borrow_and_update().clone();
                    let percent = percent + found.percent.min(100) * (99 - percent) / 100;
                    view.bootstrap(found, percent);
                }
                order = orders.next() => match order {
                    Order::Connect(_, reply) => busy(reply, "a connection is being made; disconnect first"),
                    Order::Reconnect(reply) => busy(reply, "a connection is being made"),
                    Order::Lockdown(on, reply) => orders.hold(on, reply),
                    Order::Disconnect(reply) => {
                        accept(reply);
                        unwanted = true;
                    }
                    Order::Shutdown => unwanted = true,
                },
            }
            if unwanted && phase.interruptible() {
                return Outcome::Unwanted;
            }
        }
    }

    fn failed(self, failure: Failure, touched: bool) -> Stage {
        tracing::error!(code = failure.code.as_str(), "cannot connect: {}", failure.text);
        if self.hold {
            Stage::Blocked(Blocked::rebuild(Some(self.request), failure, self.attempt))
        } else if touched {
            Stage::Disconnecting(Disconnecting { reason: failure.reason() })
        } else {
            Stage::Disconnected(Disconnected::after(&failure))
        }
    }
}

/// How much of an attempt a phase is, in percent. Waiting for Tor is by far the longest, so the others count little there.
fn step(phases: &[Phase]) -> u32 {
    if phases.contains(&Phase::WaitBootstrap) { 2 } else { 100 / u32::try_from(phases.len()).unwrap_or(100) }
}
