//! Tells when somebody changes the network, by netlink's multicast groups (rtnetlink(7), nf_tables). What changed is for a
//! look to find out; here only noise is left out, and looks are kept apart.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, SocketAddr, TokioSocket};
use tokio::time::{Instant, sleep_until};

use super::Error;
use super::desired::{NFT_TABLE, TABLE};
use super::plan::MAIN;

/// RTNLGRP_LINK, neighbours, addresses, routes and rules of both versions (linux/rtnetlink.h), as bits.
const ROUTE_GROUPS: u32 = group(1) | group(3) | group(5) | group(7) | group(8) | group(9) | group(11) | group(19);
/// NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h).
const NFT_GROUPS: u32 = group(7);
/// Changes that come together are one, and a flood of noise wakes us no oftener.
const SETTLE: Duration = Duration::from_millis(3);
/// What is no haste.
const LATER: Duration = Duration::from_secs(1);
/// Messages that are read at once; after more, a look at all is cheaper.
const BURST: u32 = 1_000;
/// The kernel's messages are smaller (`NLMSG_GOODSIZE`); of a longer one the rest is not needed.
const BUFFER: usize = 1 << 15;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_DELRULE: u16 = 33;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct rtmsg`.
const ROUTE_HEADER: usize = 12;
/// `RTM_F_CLONED`: an entry of a cache.
const CLONED: u32 = 0x200;
const RTA_TABLE: u16 = 15;
/// `struct nfgenmsg`.
const NFT_HEADER: usize = 4;
/// `NFTA_TABLE_NAME`, and the table's name in messages about chains, rules, sets and objects (linux/netfilter/nf_tables.h).
const NFTA_NAME: u16 = 1;

const fn group(number: u32) -> u32 {
    1 << (number - 1)
}

/// How soon somebody should look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Heard {
    Nothing,
    Later,
    Now,
}

/// A watch on the network of the thread that opened it.
pub struct Watch {
    route: TokioSocket,
    /// `None`: a kernel without nf_tables.
    nft: Option<TokioSocket>,
    /// Tables of other names count too: those that iptables uses.
    every_table: bool,
    /// Index of the device whose neighbours matter; 0: none.
    device: Arc<AtomicU32>,
    buffer: Vec<u8>,
    /// When to look; none: nothing was heard.
    due: Option<Instant>,
    /// Until when nothing is read.
    rest: Instant,
    pace: Pace,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("due", &self.due).field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl Watch {
    /// Must be called within a tokio runtime.
    pub(super) fn open(every_table: bool, device: Arc<AtomicU32>) -> Result<Self, Error> {
        let route = subscribe(NETLINK_ROUTE, ROUTE_GROUPS).map_err(Error::Connect)?;
        let nft = subscribe(NETLINK_NETFILTER, NFT_GROUPS)
            .inspect_err(|error| tracing::warn!(%error, "changes of the firewall are not seen at once"))
            .ok();
        let (now, buffer) = (Instant::now(), Vec::with_capacity(BUFFER));
        Ok(Self { route, nft, every_table, device, buffer, due: None, rest: now, pace: Pace::new(now) })
    }

    /// Waits until it is time to look. May be dropped while it waits: nothing is lost.
    pub async fn changed(&mut self) {
        loop {
            sleep_until(self.rest).await;
            let due = self.due.map(|due| due.max(self.pace.earliest));
            if due.is_some_and(|due| due <= Instant::now()) {
                // What came meanwhile is what the look will see.
                poll_fn(|cx| Poll::Ready(self.poll(cx).is_ready())).await;
                self.due = None;
                return;
            }
            tokio::select! {
                () = poll_fn(|cx| self.poll(cx)) => self.rest = Instant::now() + SETTLE,
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {}
            }
        }
    }

    /// It is time to look after so long, though nothing is heard.
    pub fn again(&mut self, after: Duration) {
        self.due = self.due.into_iter().chain([Instant::now() + after]).min();
    }

    /// A look that began at `began` has ended, and `mended` something or not.
    pub fn looked(&mut self, began: Instant, mended: bool) {
        self.pace.looked(began, Instant::now(), mended);
    }

    /// Whether somebody undoes again and again what is put back.
    #[must_use]
    pub fn contested(&self) -> bool {
        self.pace.contested(Instant::now())
    }

    /// Reads all that is there. Ready when something was heard.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut heard = None;
        let device = self.device.load(Ordering::Relaxed);
        let mut sockets = [(Some(&self.route), false), (self.nft.as_ref(), true)];
        for (socket, nft) in sockets.iter_mut().filter_map(|(socket, nft)| Some(((*socket)?, *nft))) {
            for count in 0.. {
                self.buffer.clear();
                let Poll::Ready(read) = socket.poll_recv(cx, &mut self.buffer) else { break };
                let what = match read {
                    Ok(()) if count < BURST => {
                        let one = |message| {
                            if nft { firewall(message, self.every_table) } else { routing(message, device) }
                        };
                        messages(&self.buffer).map(one).max().unwrap_or(Heard::Nothing)
                    }
                    // ENOBUFS: more happened than the socket can hold.
                    Ok(()) | Err(_) => Heard::Now,
                };
                heard = heard.max(Some(what));
                if count == BURST {
                    cx.waker().wake_by_ref();
                    break;
                }
            }
        }
        let Some(heard) = heard else { return Poll::Pending };
        let due = match heard {
            Heard::Nothing => None,
            Heard::Later => Some(Instant::now() + LATER),
            Heard::Now => Some(Instant::now()),
        };
        self.due = self.due.into_iter().chain(due).min();
        Poll::Ready(())
    }
}

fn subscribe(protocol: isize, groups: u32) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

/// How far looks are kept apart. Single changes are looked at at once; under a flood of changes looks take a bounded share of
/// the time; and who undoes again and again what is put back gets slower and slower answers, so that two programs can't keep
/// the machine busy.
#[derive(Debug)]
struct Pace {
    /// Of the next look.
    earliest: Instant,
    /// When the last look ended, and how much more than their share looks had taken then.
    looked: (Instant, Duration),
    /// When something was put back last, and how often in a row.
    mended: Option<(Instant, u32)>,
}

impl Pace {
    /// Looks take one part in so many of the time.
    const SHARE: u32 = 8;
    /// So much more they may take for a short time.
    const BURST: Duration = Duration::from_millis(300);
    const REST: Duration = Duration::from_millis(5);
    const LONGEST_REST: Duration = Duration::from_millis(250);
    /// So many times in a row things are put back at once.
    const PATIENCE: u32 = 10;
    /// Nothing was put back for so long: the row is over.
    const ROW: Duration = Duration::from_secs(10);
    const FIRST_DELAY: Duration = Duration::from_millis(40);
    const LONGEST_DELAY: Duration = Duration::from_secs(1);
    /// How long after the last time it is told.
    const TOLD: Duration = Duration::from_secs(60);

    const fn new(now: Instant) -> Self {
        Self { earliest: now, looked: (now, Duration::ZERO), mended: None }
    }

    fn looked(&mut self, began: Instant, now: Instant, mended: bool) {
        let (last, taken) = self.looked;
        let share = now.saturating_duration_since(last) / Self::SHARE;
        let taken = (taken + now.saturating_duration_since(began)).saturating_sub(share);
        self.looked = (now, taken);
        let rest = (taken.saturating_sub(Self::BURST) * Self::SHARE).clamp(Self::REST, Self::LONGEST_REST);
        self.earliest = now + rest;
        if !mended {
            return;
        }
        let row = self.mended.filter(|(last, _)| now - *last < Self::ROW).map_or(0, |(_, row)| row).saturating_add(1);
        self.mended = Some((now, row));
        if let Some(over) = row.checked_sub(Self::PATIENCE) {
            let delay = Self::FIRST_DELAY.saturating_mul(1 << over.min(10)).min(Self::LONGEST_DELAY);
            self.earliest = now + delay.max(rest);
        }
    }

    fn contested(&self, now: Instant) -> bool {
        self.mended.is_some_and(|(last, row)| row >= Self::PATIENCE && now - last < Self::TOLD)
    }
}

/// A message of rtnetlink(7). `device`: whose neighbours matter.
fn routing(message: &[u8], device: u32) -> Heard {
    let Some(kind) = u16_at(message, 4) else { return Heard::Now };
    if kind == RTM_NEWNEIGH || kind == RTM_DELNEIGH {
        // In struct ndmsg behind the family.
        let ours = u32_at(message, HEADER + 4).is_none_or(|index| index == device);
        return if ours { Heard::Now } else { Heard::Nothing };
    }
    if kind != RTM_NEWROUTE && kind != RTM_DELROUTE {
        return if (RTM_NEWLINK..=RTM_DELRULE).contains(&kind) { Heard::Now } else { Heard::Nothing };
    }
    let (Some(prefix), Some(table), Some(flags)) =
        (message.get(HEADER + 1), message.get(HEADER + 4), u32_at(message, HEADER + 8))
    else {
        return Heard::Now;
    };
    if flags & CLONED != 0 {
        return Heard::Nothing;
    }
    let long = attribute(message, HEADER + ROUTE_HEADER, RTA_TABLE).and_then(|value| u32_at(value, 0));
    match long.unwrap_or_else(|| u32::from(*table)) {
        TABLE => Heard::Now,
        // A default route: another uplink. Others in main can only change the way to the upstream, or be worth a hint.
        MAIN if *prefix == 0 => Heard::Now,
        MAIN => Heard::Later,
        _ => Heard::Nothing,
    }
}

/// A message of nf_tables. Rules of others stand in tables of their own, and can't let through what ours drop.
fn firewall(message: &[u8], every_table: bool) -> Heard {
    let name = attribute(message, HEADER + NFT_HEADER, NFTA_NAME).unwrap_or_default();
    if every_table || name.starts_with(NFT_TABLE.as_bytes()) { Heard::Now } else { Heard::Nothing }
}

/// Splits a buffer into messages; one that was cut off is given as it is, and what is malformed ends it.
fn messages(buffer: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok().filter(|length| *length >= HEADER)?;
        let message = rest.get(..length).unwrap_or(rest);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The value of the first attribute of a kind, behind `at` bytes.
fn attribute(message: &[u8], at: usize, kind: u16) -> Option<&[u8]> {
    let mut rest = message.get(at..)?;
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(4..length)?;
        // Without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
        if u16_at(rest, 2)? & 0x3fff == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn message(kind: u16, header: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; 4];
        message.extend(kind.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend(header);
        for (kind, value) in attributes {
            message.extend(u16::try_from(4 + value.len()).unwrap_or(0).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(*value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(message.len()).unwrap_or(0).to_ne_bytes();
        message[..4].copy_from_slice(&length);
        message
    }

    fn route(prefix: u8, table: u8, flags: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut header = vec![2, prefix, 0, 0, table, 3, 0, 1];
        header.extend(flags.to_ne_bytes());
        message(RTM_NEWROUTE, &header, attributes)
    }

    #[test]
    fn only_what_can_matter_makes_us_look() {
        let ours = TABLE.to_ne_bytes();
        let other = 52_u32.to_ne_bytes();
        let cases = [
            (message(RTM_NEWLINK, &[0; 16], &[]), Heard::Now),
            (message(17, &[0; 16], &[]), Heard::Now),
            (message(20, &[0; 8], &[]), Heard::Now),
            (message(32, &[0; 12], &[]), Heard::Now),
            (message(RTM_DELRULE, &[0; 12], &[]), Heard::Now),
            (message(68, &[0; 16], &[]), Heard::Nothing),
            (message(RTM_DELNEIGH, &[2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0], &[]), Heard::Now),
            (message(RTM_NEWNEIGH, &[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0], &[]), Heard::Nothing),
            (route(0, 254, 0, &[]), Heard::Now),
            (route(24, 254, 0, &[(1, &[10, 0, 0, 0])]), Heard::Later),
            (route(24, 252, 0, &[(RTA_TABLE, &ours)]), Heard::Now),
            (route(0, 52, 0, &[(RTA_TABLE, &other)]), Heard::Nothing),
            (route(128, 255, 0, &[]), Heard::Nothing),
            (route(0, 254, CLONED, &[]), Heard::Nothing),
        ];
        for (message, expected) in cases {
            assert_eq!(routing(&message, 7), expected, "{message:?}");
        }
        let nft = |name: &[u8]| message(0x0a07, &[1, 0, 0, 0], &[(NFTA_NAME, name)]);
        assert_eq!(firewall(&nft(b"proxyvpn\0"), false), Heard::Now);
        assert_eq!(firewall(&nft(b"filter\0"), false), Heard::Nothing);
        assert_eq!(firewall(&nft(b"filter\0"), true), Heard::Now);
        assert_eq!(firewall(&message(0x0a0f, &[0; 4], &[(1, &[0, 0, 0, 7])]), false), Heard::Nothing);
    }

    #[test]
    fn what_is_cut_off_or_malformed_never_panics() {
        let whole =
            [route(24, 252, 0, &[(1, &[10, 0, 0, 0]), (RTA_TABLE, &TABLE.to_ne_bytes())]), vec![3; 40]].concat();
        for length in 0..whole.len() {
            for message in messages(&whole[..length]) {
                let _ = (routing(message, 7), firewall(message, false));
            }
        }
        // An attribute without a length ends the search.
        assert_eq!(attribute(&[0; 64], 0, 1), None);
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(messages(&whole).map(|message| routing(message, 7)).max(), Some(Heard::Now));
    }

    #[test]
    fn one_change_is_looked_at_at_once_and_a_flood_takes_a_share() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert_eq!(pace.earliest, start);
        for (took, least, most) in [(5, 1_100, 1_600), (50, 1_100, 2_100), (500, 2_000, 7_000)] {
            let mut pace = Pace::new(start);
            let (mut now, mut busy) = (start, 0);
            while now - start < ms(10_000) {
                let began = now;
                now += ms(took);
                pace.looked(began, now, false);
                assert!(pace.earliest > now && pace.earliest - now <= Pace::LONGEST_REST);
                now = pace.earliest;
                busy += took;
            }
            assert!((least..=most).contains(&busy), "of 10 s {busy} ms in looks of {took} ms");
        }
        // Now and then one after the other.
        let mut now = start;
        for _ in 0..100 {
            pace.looked(now, now + ms(20), false);
            assert_eq!(pace.earliest - now, ms(20) + Pace::REST);
            now += ms(200);
        }
        assert!(!pace.contested(start));
    }

    #[test]
    fn a_fight_gets_slower_and_is_told() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let delays: Vec<u128> = (0..20)
            .map(|_| {
                pace.looked(now, now + ms(2), true);
                let delay = pace.earliest - now;
                now = pace.earliest;
                delay.as_millis()
            })
            .collect();
        assert!(delays[..9].iter().all(|delay| *delay < 50), "{delays:?}");
        assert!(delays.windows(2).all(|pair| pair[0] <= pair[1]) && delays[19] == 1_002, "{delays:?}");
        assert!(pace.contested(now));
        assert!(!pace.contested(now + Pace::TOLD));
        // Now and then is no fight.
        let mut pace = Pace::new(now);
        for _ in 0..30 {
            pace.looked(now, now + ms(2), true);
            assert!(pace.earliest - now < ms(50) && !pace.contested(now));
            now += Pace::ROW + ms(2);
        }
    }
}
