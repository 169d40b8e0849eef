//! Segments that the kernel gave to the wrong shard.
//!
//! A TUN device chooses the queue of a packet by a hash that is the same for both directions, unless a packet of the same hash was
//! written to another queue within the last 3 s (`tun_automq_select_queue`, `tun_flow_update` in drivers/net/tun.c). A shard answers
//! on the queue that it was asked on, so the two agree. What could make them differ is rare (two flows with one 32-bit hash, an
//! administrator's classifier or BPF program), but answering such a segment with a RST would cut a connection that lives on another
//! shard. So it goes round the shards, and the first one answers if none of them knows it: nobody else may write that hash.

use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Segments that wait for one shard: at most 2 MiB.
const WAITING: usize = 32;

/// A TCP segment, checked, that `asked` shards looked at and know nothing of.
#[derive(Debug)]
pub(crate) struct Stray {
    pub(crate) packet: Box<[u8]>,
    pub(crate) asked: usize,
}

/// The way to the next shard in the ring.
#[derive(Debug)]
pub(crate) struct Peers {
    next: Sender<Stray>,
    shards: usize,
}

/// What became of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandedOver {
    /// The next shard has it.
    Yes,
    /// The next shard has too many already.
    Full,
    /// All shards were asked.
    Nobody,
}

impl Peers {
    /// A ring of `shards` shards, each with what comes to it.
    pub(crate) fn ring(shards: usize) -> Vec<(Self, Receiver<Stray>)> {
        let (mut next, strays): (Vec<_>, Vec<_>) = (0..shards).map(|_| channel(WAITING)).unzip();
        next.rotate_left(1.min(shards));
        next.into_iter().map(|next| Self { next, shards }).zip(strays).collect()
    }

    /// Hands `packet`, which this shard knows nothing of, to the next. `asked` shards looked at it before: 0 for the one that read it
    /// from the device, all of them when it has come round.
    pub(super) fn hand_over(&self, packet: &[u8], asked: usize) -> HandedOver {
        if self.shards == 1 || asked >= self.shards {
            return HandedOver::Nobody;
        }
        match self.next.try_reserve() {
            Ok(place) => {
                place.send(Stray { packet: packet.into(), asked: asked + 1 });
                HandedOver::Yes
            }
            // One that has ended takes its flows with it; its controller starts the engine anew.
            Err(_) => HandedOver::Full,
        }
    }
}
