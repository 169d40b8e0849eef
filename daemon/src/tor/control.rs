//! The connection to the control port.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::circuit::{self, Circuit};
use super::event::{Bootstrap, Event, MAX_TEXT};
use super::password::Password;
use super::reply::{Assembler, EVENT, Malformed, Reply};
use crate::lines::{Line, Lines, clean};

/// How often Tor takes a new identity at most; a request before that is done when the time is over (`MAX_SIGNEWNYM_RATE`).
pub const NEWNYM_INTERVAL: Duration = Duration::from_secs(10);

/// Tor is one network hop away, and answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Tor says at once when it has taken a new identity.
const NEWNYM_TIME: Duration = Duration::from_millis(500);
/// Bytes of the longest line.
const MAX_LINE: usize = 64 * 1024;
/// Events that wait for [`Control::next`]; the oldest go first.
const MAX_EVENTS: usize = 64;
/// Relays of which address and country are asked in one call.
const MAX_LOOKUPS: usize = 64;

/// Why Tor can't be controlled. What Tor says is in the message, bounded and harmless.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("Tor's control port {address} can't be reached")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Another password than the one whose hash Tor was given.
    #[error("Tor's control port refuses the password of this run")]
    Password,
    /// Tor refuses a command.
    #[error("Tor refuses {command}: {code} {text}")]
    Refused {
        /// Its first word.
        command: String,
        /// Tor's code (control-spec section 4).
        code: u16,
        /// Tor's words.
        text: String,
    },
    /// No answer in time.
    #[error("Tor did not answer on its control port within {} s", TIMEOUT.as_secs())]
    Silent,
    /// The other end is gone.
    #[error("Tor closed its control port")]
    Closed,
    /// The connection broke.
    #[error("the connection to Tor's control port broke")]
    Broken(#[source] io::Error),
    /// What came is not the protocol.
    #[error("what came from Tor's control port can't be understood")]
    Malformed,
}

/// What became of the wish for a new identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewIdentity {
    /// New connections take new circuits.
    Now,
    /// Tor took one not long ago, and will within this time: [`Event::NewIdentity`] tells.
    Within(Duration),
}

/// A connection that has authenticated. The calls are cancel safe: the answer to a command that nobody waits for is dropped.
#[derive(Debug)]
pub struct Control {
    lines: Lines<TcpStream>,
    assembler: Assembler,
    /// Commands sent and answered.
    sent: u64,
    answered: u64,
    events: VecDeque<Event>,
    /// When Tor last took a new identity.
    renewed: Option<Instant>,
    /// The end was told.
    over: bool,
}

impl Control {
    /// Connects, authenticates and asks for events.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn connect(address: SocketAddr, password: &Password) -> Result<Self, Error> {
        let connecting = timeout(TIMEOUT, TcpStream::connect(address)).await;
        let stream = connecting
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| Error::Connect { address, source })?;
        let mut control = Self {
            lines: Lines::new(stream, MAX_LINE),
            assembler: Assembler::default(),
            sent: 0,
            answered: 0,
            events: VecDeque::new(),
            renewed: None,
            over: false,
        };
        match control.command(&format!("AUTHENTICATE \"{}\"", password.secret())).await {
            Err(Error::Refused { code: 515, .. }) => return Err(Error::Password),
            other => other?,
        };
        control.command("SETEVENTS STATUS_CLIENT STATUS_GENERAL SIGNAL").await?;
        Ok(control)
    }

    /// How far Tor's start is.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn bootstrap(&mut self) -> Result<Bootstrap, Error> {
        let reply = self.command("GETINFO status/bootstrap-phase").await?;
        reply.value("status/bootstrap-phase").and_then(|(text, _)| Bootstrap::parse(text)).ok_or(Error::Malformed)
    }

    /// Whether connections can be made.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn circuit_established(&mut self) -> Result<bool, Error> {
        let reply = self.command("GETINFO status/circuit-established").await?;
        Ok(reply.value("status/circuit-established").ok_or(Error::Malformed)?.0 == "1")
    }

    /// Has new connections take new circuits (`SIGNAL NEWNYM`). Those that are open stay where they are.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn new_identity(&mut self) -> Result<NewIdentity, Error> {
        let before = self.renewed;
        self.command("SIGNAL NEWNYM").await?;
        let taken = timeout(NEWNYM_TIME, async {
            while self.renewed == before {
                self.turn().await?;
            }
            Ok(())
        });
        match taken.await {
            Ok(taken) => taken.map(|()| NewIdentity::Now),
            Err(_) => {
                let passed = before.map_or(Duration::ZERO, |before| before.elapsed());
                Ok(NewIdentity::Within(NEWNYM_INTERVAL.saturating_sub(passed)))
            }
        }
    }

    /// The circuits that carry, or can carry, the host's connections, with what Tor knows of their relays.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn circuits(&mut self) -> Result<Vec<Circuit>, Error> {
        let reply = self.command("GETINFO circuit-status").await?;
        let (first, more) = reply.value("circuit-status").ok_or(Error::Malformed)?;
        let mut circuits = circuit::circuits(std::iter::once(first).chain(more.iter().map(|line| &**line)));
        let mut known = HashMap::new();
        for relay in circuits.iter_mut().flat_map(|circuit| &mut circuit.path) {
            if !known.contains_key(&relay.fingerprint) && known.len() < MAX_LOOKUPS {
                let found = self.look_up(&relay.fingerprint).await?;
                known.insert(relay.fingerprint.clone(), found);
            }
            (relay.address, relay.country) = known.get(&relay.fingerprint).cloned().unwrap_or_default();
        }
        Ok(circuits)
    }

    /// Where a relay is. Tor knows neither of a bridge, and no country without its database.
    async fn look_up(&mut self, fingerprint: &str) -> Result<(Option<std::net::IpAddr>, Option<String>), Error> {
        let Some(entry) = self.get(&format!("ns/id/{fingerprint}")).await? else { return Ok((None, None)) };
        let Some(address) = circuit::address(entry.lines()) else { return Ok((None, None)) };
        let country = self.get(&format!("ip-to-country/{address}")).await?;
        Ok((Some(address), country.and_then(|country| circuit::country(&country))))
    }

    /// One value, in lines; `None` when Tor has none.
    async fn get(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.command(&format!("GETINFO {key}")).await {
            Ok(reply) => {
                Ok(reply.value(key).map(|(first, more)| format!("{first}\n{}", more.join("\n")).trim_end().to_owned()))
            }
            Err(Error::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What Tor tells next. After [`Event::Closed`] nothing comes any more. Cancel safe.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            if self.over {
                return std::future::pending().await;
            }
            if let Err(error) = self.turn().await {
                self.over = true;
                return Event::Closed(
                    std::error::Error::source(&error).map_or(error.to_string(), |cause| format!("{error}: {cause}")),
                );
            }
        }
    }

    /// Sends a line and waits for the answer to it. The line has no part that somebody else chose.
    async fn command(&mut self, line: &str) -> Result<Reply, Error> {
        if !self.lines.send(format!("{line}\r\n").as_bytes()) {
            return Err(Error::Silent);
        }
        self.sent += 1;
        let own = self.sent;
        let answer = timeout(TIMEOUT, async {
            loop {
                if let Some(reply) = self.turn().await?
                    && self.answered == own
                {
                    return Ok(reply);
                }
            }
        });
        let reply = answer.await.map_err(|_| Error::Silent)??;
        if (200..300).contains(&reply.code) {
            return Ok(reply);
        }
        let command = line.split(' ').next().unwrap_or_default().to_owned();
        Err(Error::Refused { command, code: reply.code, text: clean(reply.text(), MAX_TEXT) })
    }

    /// Takes a line; gives the reply that it ends.
    async fn turn(&mut self) -> Result<Option<Reply>, Error> {
        let line = match self.lines.next().await.map_err(Error::Broken)? {
            Some(Line::Text(line)) => line,
            Some(Line::TooLong) => return Err(Error::Malformed),
            None => return Err(Error::Closed),
        };
        match self.assembler.feed(&line) {
            Ok(Some(reply)) if reply.code == EVENT => {
                self.tell(&reply);
                Ok(None)
            }
            Ok(Some(_)) if self.answered == self.sent => Err(Error::Malformed),
            Ok(Some(reply)) => {
                self.answered += 1;
                Ok(Some(reply))
            }
            Ok(None) => Ok(None),
            Err(Malformed::Line | Malformed::TooLarge) => Err(Error::Malformed),
        }
    }

    fn tell(&mut self, reply: &Reply) {
        let Some(event) = Event::parse(reply) else { return };
        if event == Event::NewIdentity {
            self.renewed = Some(Instant::now());
        }
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
