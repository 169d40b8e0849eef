//! A program behind a complete TCP stack (smoltcp's), at the other end of a device without offloads. It sends a stream,
//! finishes, and takes what comes.

use std::net::IpAddr;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::Double;
use super::script::{content, contents};

/// The program.
pub(crate) struct Client {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    device: Far,
    salt: u8,
    /// Bytes that it sends.
    length: usize,
    written: usize,
    /// Bytes that came, all of them as they should be.
    pub(crate) read: usize,
}

impl Client {
    /// Connects from `source` to port 80 of `destination`, to send `length` bytes of the stream `salt` and take `!salt`.
    pub(crate) fn new(
        device: Double,
        source: IpAddr,
        destination: IpAddr,
        salt: u8,
        length: usize,
        now: Instant,
    ) -> Self {
        let mut device = Far(device);
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut device, now);
        let source = IpAddress::from(source);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(source, 0)).unwrap());
        let ring = || SocketBuffer::new(vec![0; 16 * 1024]);
        let mut socket = Socket::new(ring(), ring());
        socket.set_nagle_enabled(false);
        socket.connect(interface.context(), (IpAddress::from(destination), 80), (source, 4000)).unwrap();
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Self { interface, sockets, handle, device, salt, length, written: 0, read: 0 }
    }

    /// Does what can be done; true when something was.
    pub(crate) fn turn(&mut self, now: Instant) -> Result<bool, String> {
        let before = (self.written, self.read, self.state());
        let polled = self.interface.poll(now, &mut self.device, &mut self.sockets);
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        if socket.can_send() && self.written < self.length {
            let bytes = contents(self.salt, self.written, self.length.min(self.written + 5000));
            self.written += socket.send_slice(&bytes).unwrap();
        }
        if self.written == self.length && socket.may_send() {
            socket.close();
        }
        while socket.can_recv() {
            let (salt, from) = (!self.salt, self.read);
            let taken = socket.recv(|bytes| {
                let good = bytes.iter().enumerate().all(|(i, byte)| *byte == content(salt, from + i));
                (bytes.len(), good.then_some(bytes.len()))
            });
            self.read +=
                taken.unwrap().ok_or(format!("the program got other bytes than the upstream sent, after {from}"))?;
        }
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        Ok(polled == smoltcp::iface::PollResult::SocketStateChanged
            || before != (self.written, self.read, self.state()))
    }

    /// TCP state.
    pub(crate) fn state(&self) -> State {
        self.sockets.get::<Socket<'_>>(self.handle).state()
    }

    /// True when it needs nothing more.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state(), State::Closed | State::TimeWait)
    }

    /// When [`turn`](Self::turn) is due.
    pub(crate) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }
}

/// The other end of a [`Double`].
struct Far(Double);

impl Device for Far {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Transmit;

    fn receive(&mut self, _: Instant) -> Option<(Frame, Transmit)> {
        Some((Frame(self.0.next()?), Transmit(self.0.clone())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit> {
        Some(Transmit(self.0.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

struct Frame(Vec<u8>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Transmit(Double);

impl TxToken for Transmit {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.put(frame);
        result
    }
}
