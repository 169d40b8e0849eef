//! `blocked`: a connection is wanted but cannot be had. Traffic is stopped, with a reason and a retry.

use std::pin::pin;
use std::time::Duration;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Reason, State};
use tokio::time::{Instant, sleep_until};

use super::connected::Connected;
use super::connecting::Connecting;
use super::context::{Context, Order, accept, answer, busy, refuse};
use super::disconnecting::Disconnecting;
use super::world::{Fault, Inspector, World};
use super::{Failure, Request, Stage};

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// A change that makes success likely makes us try at once, but no sooner after the last attempt.
const QUICK_RETRY: Duration = Duration::from_millis(500);

/// After so many attempts that failed the upstream's name is looked up anew: it may have another address by now. That is after a
/// minute, when connections that waited are lost anyway.
const RENEW: u32 = 5;

pub(super) struct Blocked {
    /// What is wanted; `None` when the record of it cannot be read.
    request: Option<Request>,
    failure: Failure,
    /// Device and engine are gone; otherwise they still run and only the upstream is missing.
    rebuild: bool,
    attempt: u32,
    /// Why even the block failed, so that the network may be open.
    unclosed: Option<String>,
}

enum Wake {
    Order(Order),
    Fault(Fault),
    Retry,
}

impl Blocked {
    /// All is in place except the upstream.
    pub(super) fn waiting(request: Request, failure: Failure) -> Self {
        Self { request: Some(request), failure, rebuild: false, attempt: 0, unclosed: None }
    }

    /// Device and engine must be made anew. `attempt` failed attempts came before this one.
    pub(super) fn rebuild(request: Option<Request>, failure: Failure, attempt: u32) -> Self {
        Self { request, failure, rebuild: true, attempt, unclosed: None }
    }

    pub(super) async fn next<W: World, I: Inspector>(mut self, context: &mut Context<W, I>) -> Stage {
        if self.rebuild {
            self.close(context).await;
        }
        let reason = self.reason();
        tracing::warn!(code = reason.code, "blocked: {}", reason.text);
        context.enter(State::Blocked, reason, self.request.as_ref());
        let mut tried = Instant::now();
        let mut retry = tried + backoff(self.attempt);
        loop {
            let wake = tokio::select! {
                order = context.orders.next() => Wake::Order(order),
                fault = context.world.fault() => Wake::Fault(fault),
                () = sleep_until(retry) => Wake::Retry,
            };
            match wake {
                Wake::Order(Order::Connect(_, reply)) => {
                    busy(reply, "a connection is wanted and blocked; disconnect first")
                }
                Wake::Order(Order::Disconnect(reply)) => {
                    accept(reply);
                    return Stage::Disconnecting(Disconnecting::requested());
                }
                Wake::Order(Order::Reconnect(reply)) => match self.request {
                    Some(request) => {
                        accept(reply);
                        return Stage::Connecting(Connecting::again(request, 0));
                    }
                    None => {
                        refuse(reply, Error::NotConnected("what was wanted is not known; disconnect first".to_owned()))
                    }
                },
                Wake::Order(Order::Lockdown(on, reply)) => {
                    let done = context.set_lockdown(on).await;
                    answer(reply, done);
                }
                Wake::Order(Order::Shutdown) => return Stage::Disconnecting(Disconnecting::requested()),
                Wake::Fault(Fault::Upstream(failure)) => {
                    context.because(failure.reason());
                }
                Wake::Fault(Fault::Health) => context.look().await,
                Wake::Fault(Fault::Uplink) => {
                    self.attempt = 0;
                    // What still runs asks the upstream by itself.
                    let after = if self.rebuild { QUICK_RETRY } else { FIRST_RETRY };
                    retry = retry.min(Instant::now().max(tried + after));
                }
                Wake::Fault(Fault::UpstreamWorking) if self.rebuild => {}
                Wake::Fault(Fault::UpstreamWorking) => return self.recovered(),
                Wake::Fault(Fault::Broken(failure)) => {
                    self.failure = failure;
                    self.rebuild = true;
                    self.attempt = 0;
                    return Stage::Blocked(self);
                }
                Wake::Retry if self.rebuild => {
                    self.attempt = self.attempt.saturating_add(1);
                    let Some(request) = self.request.take() else {
                        // What is wanted is not known, but the block stays, and comes back if others removed it.
                        self.close(context).await;
                        context.because(self.reason());
                        tried = Instant::now();
                        retry = Instant::now() + backoff(self.attempt);
                        continue;
                    };
                    return Stage::Connecting(Connecting::again(request, self.attempt));
                }
                Wake::Retry => {
                    match probe(context).await {
                        Probe::Answered(Ok(())) => return self.recovered(),
                        Probe::Answered(Err(failure)) => {
                            context.because(failure.reason());
                            if self.attempt >= RENEW && self.named() {
                                self.failure = failure;
                                self.rebuild = true;
                                return Stage::Blocked(self);
                            }
                        }
                        Probe::Unwanted => return Stage::Disconnecting(Disconnecting::requested()),
                        Probe::Again => {
                            let Some(request) = self.request.take() else { continue };
                            return Stage::Connecting(Connecting::again(request, 0));
                        }
                    }
                    context.orders.release();
                    context.look().await;
                    self.attempt = self.attempt.saturating_add(1);
                    tried = Instant::now();
                    retry = tried + backoff(self.attempt);
                }
            }
        }
    }

    /// Puts the block in force; if even that fails, the reason says so.
    async fn close<W: World, I: Inspector>(&mut self, context: &mut Context<W, I>) {
        let closed = context.world.block(self.request.as_ref()).await;
        self.unclosed = closed.err().map(|failure| failure.text);
    }

    fn reason(&self) -> Reason {
        let mut reason = self.failure.reason();
        if let Some(cause) = &self.unclosed {
            let cause = if *cause == self.failure.text { String::new() } else { format!(" ({cause})") };
            reason.text = format!(
                "{}. The block could not be put in force either{cause}: traffic may leave unprotected. \
                 Unplug the network or run `proxyctl disconnect`",
                self.failure.text.trim_end_matches('.')
            );
        }
        reason
    }

    /// Whether the upstream's addresses come from a look-up.
    fn named(&self) -> bool {
        let upstream = self.request.as_ref().map(|request| &request.profile.upstream);
        upstream.is_some_and(|spec| spec.addresses.is_empty() && spec.host.parse::<std::net::IpAddr>().is_err())
    }

    fn recovered(self) -> Stage {
        match self.request {
            Some(request) => Stage::Connected(Connected::new(request)),
            None => Stage::Blocked(self),
        }
    }
}

enum Probe {
    Answered(Result<(), Failure>),
    /// A reconnect was asked for.
    Again,
    Unwanted,
}

/// Asks the upstream, with an ear for orders.
async fn probe<W: World, I: Inspector>(context: &mut Context<W, I>) -> Probe {
    let Context { world, orders, .. } = context;
    let mut question = pin!(world.probe());
    loop {
        tokio::select! {
            answer = &mut question => return Probe::Answered(answer),
            order = orders.next() => match order {
                Order::Connect(_, reply) => busy(reply, "a connection is wanted and blocked; disconnect first"),
                Order::Reconnect(reply) => {
                    accept(reply);
                    return Probe::Again;
                }
                Order::Lockdown(on, reply) => orders.hold(on, reply),
                Order::Disconnect(reply) => {
                    accept(reply);
                    return Probe::Unwanted;
                }
                Order::Shutdown => return Probe::Unwanted,
            },
        }
    }
}

/// 1 s, doubled with each failed attempt, at most 60 s.
fn backoff(attempt: u32) -> Duration {
    FIRST_RETRY.saturating_mul(1 << attempt.min(6)).min(LAST_RETRY)
}
