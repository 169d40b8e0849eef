//! One smoltcp TCP socket in a set of its own, on rings that lie in a slab.
//!
//! smoltcp wants `&'static mut` rings for a socket that is stored. The socket therefore never leaves this type: as long as
//! nothing outside can take it out, the rings cannot outlive their block.

use std::ptr::NonNull;

use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp::{self, CongestionControl, RecvError, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpAddress, IpListenEndpoint};

use super::slab::{Block, Half, Slab};
use crate::packet::parse::Data;

/// A socket towards a program on this machine.
#[derive(Debug)]
pub(crate) struct Connection {
    // Dropped before `block`: fields drop in order of declaration.
    set: SocketSet<'static>,
    handle: SocketHandle,
    block: Block,
    /// Sequence number of the program's first byte.
    first: u32,
    /// Bytes that were put into the ring from the program in order, in all.
    taken_in: usize,
    /// How far segments that came before their turn may reach, counted from `first`.
    reached: usize,
    /// Both when the ring from the program was last discarded: what came after lies somewhere in the ring.
    discarded: usize,
    /// Bytes that were put into the ring towards the program, in all.
    queued: usize,
}

impl Connection {
    /// A socket that listens for the SYN with number `sequence` to `address:port`. `None` when the slab is empty or the port is 0.
    pub(crate) fn listen(
        slab: &Slab,
        address: IpAddress,
        port: u16,
        sequence: u32,
        clock: fn() -> u32,
    ) -> Option<Self> {
        let block = slab.take()?;
        let (start, length) = block.memory();
        let (rx, tx) = halves(start, length);
        let mut socket = tcp::Socket::new(SocketBuffer::new(rx), SocketBuffer::new(tx));
        // The peer is this machine's kernel, on a device that loses nothing: no Nagle, no delayed ACK, no congestion window.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_congestion_control(CongestionControl::None);
        // Without timestamps the kernel's quick reuse of a port fails.
        socket.set_tsval_generator(Some(clock));
        socket.listen(IpListenEndpoint { addr: Some(address), port }).ok()?;
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(Self {
            set,
            handle,
            block,
            first: sequence.wrapping_add(1),
            taken_in: 0,
            reached: 0,
            discarded: 0,
            queued: 0,
        })
    }

    fn socket(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    fn socket_mut(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    /// Sequence number of the program's next byte in order.
    fn next(&self) -> u32 {
        self.first.wrapping_add(self.taken_in as u32)
    }

    /// How far the program's bytes in the ring may reach, counted from `first`.
    fn extent(&self) -> usize {
        self.taken_in.max(self.reached)
    }

    /// Takes one packet from `device`.
    pub(crate) fn ingress(&mut self, now: Instant, interface: &mut Interface, device: &mut impl Device, data: Data) {
        let before = self.receive_queue();
        interface.poll_ingress_single(now, device, &mut self.set);
        // A stream may be longer than sequence numbers count; the difference to what comes next tells all the same.
        if let Ok(ahead @ 1..) = usize::try_from(data.sequence.wrapping_sub(self.next()).cast_signed()) {
            self.reached = self.reached.max(self.taken_in.saturating_add(ahead).saturating_add(data.length));
        }
        self.taken_in = self.taken_in.saturating_add(self.receive_queue().saturating_sub(before));
        self.block.reaches(Half::First, self.extent() - self.discarded, self.discarded > 0);
    }

    /// Whether there is memory for `length` more bytes of the program's. There always is for those that need not wait here.
    pub(crate) fn may_take_in(&self, length: usize) -> bool {
        let reach = (self.extent() - self.discarded).saturating_add(length);
        self.receive_queue() == 0
            || self.block.lacks(Half::First, reach, self.discarded > 0) == 0
            || self.block.memory_is_left()
    }

    /// True for the sequence number of the SYN that opened this.
    pub(crate) fn was_opened_by(&self, sequence: u32) -> bool {
        self.first == sequence.wrapping_add(1)
    }

    /// True when all bytes before `sequence`, and none behind, came in order.
    pub(crate) fn is_next(&self, sequence: u32) -> bool {
        self.next() == sequence
    }

    /// Sends at most one packet; true when one was sent, so that there may be more.
    pub(crate) fn egress(&mut self, now: Instant, interface: &mut Interface, device: &mut impl Device) -> bool {
        let sent = interface.poll_egress(now, device, &mut self.set) == PollResult::SocketStateChanged;
        sent && !self.is_told()
    }

    /// When [`egress`](Self::egress) must be called next.
    pub(crate) fn poll_at(&self, now: Instant, interface: &mut Interface) -> Option<Instant> {
        let at = interface.poll_at(now, &self.set);
        at.filter(|at| *at > now || !self.is_told())
    }

    /// All that was to be sent, with its FIN, has arrived, so that one ACK is all there can be to say. smoltcp 0.14 leaves the
    /// probe of a closed window armed when the window stays closed up to the FIN, and then sends one ACK after the other.
    fn is_told(&self) -> bool {
        self.state() == State::FinWait2
    }

    /// TCP state.
    pub(crate) fn state(&self) -> State {
        self.socket().state()
    }

    /// True until the last packet (such as the RST of an abort) has been sent.
    pub(crate) fn has_peer(&self) -> bool {
        self.socket().remote_endpoint().is_some()
    }

    /// Bytes of the program that wait to be taken.
    pub(crate) fn receive_queue(&self) -> usize {
        self.socket().recv_queue()
    }

    /// Bytes that the program has not acknowledged.
    pub(crate) fn send_queue(&self) -> usize {
        self.socket().send_queue()
    }

    /// True until the FIN towards the program is on its way.
    pub(crate) fn may_send(&self) -> bool {
        self.socket().may_send()
    }

    /// True when the program still takes data and the ring towards it has room.
    pub(crate) fn can_send(&self) -> bool {
        self.socket().can_send()
    }

    /// True when the program has sent its FIN and all before it was taken.
    pub(crate) fn finished(&mut self) -> bool {
        matches!(self.socket_mut().recv(|_| (0, ())), Err(RecvError::Finished))
    }

    /// Hands `f` a run of the program's bytes; it says how many it took. `None` when there are none.
    pub(crate) fn receive<R>(&mut self, f: impl FnOnce(&[u8]) -> (usize, R)) -> Option<R> {
        if self.receive_queue() == 0 {
            return None;
        }
        let result = self.socket_mut().recv(|bytes| f(bytes)).ok();
        // The ring goes on where it is, into further pages.
        if self.receive_queue() == 0 && self.block.spare().is_none() {
            self.discard_receive_ring();
        }
        result
    }

    /// Hands `f` free room towards the program; it says how many bytes it put there. `None` when there is no room, or no memory for
    /// more of it: then there is some again when the program has acknowledged all.
    pub(crate) fn send<R>(&mut self, f: impl FnOnce(&mut [u8]) -> (usize, R)) -> Option<R> {
        if !self.can_send() {
            return None;
        }
        let page = rustix::param::page_size();
        let mut spare = self.block.spare();
        if spare.is_none() && self.send_queue() == 0 && self.block.held(Half::Second) > page {
            self.block.discard_half(Half::Second);
            spare = self.block.spare();
        }
        // A page is always to be had, so that no flow stops for good. An empty ring starts from its beginning.
        let limit = (self.block.held(Half::Second) + spare.unwrap_or(0)).max(page);
        let (start, length) = self.block.memory();
        let ring = start.as_ptr() as usize + length / 2;
        let mut taken = (0, 0);
        let sent = self.socket_mut().send(|room| {
            let at = room.as_ptr() as usize - ring;
            let length = room.len().min(limit.saturating_sub(at));
            if length == 0 {
                return (0, None);
            }
            let (n, result) = f(&mut room[..length]);
            taken = (at, n);
            (n, Some(result))
        });
        let (at, n) = taken;
        self.queued = self.queued.saturating_add(n);
        if n > 0 {
            self.block.reaches(Half::Second, at + n, false);
        }
        sent.ok().flatten()
    }

    /// Sends a FIN after what is queued.
    pub(crate) fn close(&mut self) {
        self.socket_mut().close();
    }

    /// Sends a RST at the next [`egress`](Self::egress).
    pub(crate) fn abort(&mut self) {
        self.socket_mut().abort();
    }

    /// Probes an idle program this often: the kernel answers with a RST when the program is gone.
    pub(crate) fn set_keep_alive(&mut self, interval: Option<Duration>) {
        self.socket_mut().set_keep_alive(interval);
    }

    /// Gives the memory of rings that are empty back; it is backed again when touched.
    pub(crate) fn discard_rings(&mut self) {
        if self.send_queue() > 0 {
            return;
        }
        if self.discardable() {
            self.block.discard();
            self.discarded = self.extent();
        } else {
            self.block.discard_half(Half::Second);
        }
    }

    fn discard_receive_ring(&mut self) {
        if self.discardable() {
            self.block.discard_half(Half::First);
            self.discarded = self.extent();
        }
    }

    /// Whether the ring from the program is empty. Segments that came before their turn wait in it too.
    fn discardable(&self) -> bool {
        self.receive_queue() == 0 && self.reached <= self.taken_in
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.block.touched(self.extent(), self.queued);
    }
}

/// Two rings of half the block each.
fn halves(start: NonNull<u8>, length: usize) -> (&'static mut [u8], &'static mut [u8]) {
    let half = length / 2;
    // SAFETY: `start..start + length` is one block: mapped, initialised (zeroes), and nobody else's while the block lives. The
    // two slices do not overlap. `'static` stands for "as long as the block": both slices go into the socket of the
    // `Connection` that owns the block, and that never lets the socket out and drops it first.
    unsafe {
        (
            std::slice::from_raw_parts_mut(start.as_ptr(), half),
            std::slice::from_raw_parts_mut(start.as_ptr().add(half), half),
        )
    }
}
