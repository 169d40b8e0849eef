//! A device that loses, repeats, swaps, damages and cuts frames, both ways.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use crate::device::Queue;

/// How many of 1000 frames meet which fate.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    pub(crate) lost: u16,
    pub(crate) repeated: u16,
    /// Comes after the next one.
    pub(crate) swapped: u16,
    /// One byte is another one.
    pub(crate) damaged: u16,
    /// The end is missing.
    pub(crate) cut: u16,
}

/// `Q` with faults that follow from a seed. Clones are the same device.
#[derive(Debug, Clone)]
pub(crate) struct Faults<Q> {
    inner: Q,
    rates: Rates,
    state: Rc<RefCell<State>>,
}

#[derive(Debug)]
struct State {
    random: u64,
    held: [Option<Vec<u8>>; 2],
    coming: VecDeque<Vec<u8>>,
}

impl State {
    /// xorshift64.
    fn below(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % n.max(1) as u64) as usize
    }

    /// What arrives when `frame` is sent in `direction`.
    fn pass(&mut self, rates: &Rates, direction: usize, mut frame: Vec<u8>) -> Vec<Vec<u8>> {
        let (fate, mut edge) = (self.below(1000) as u16, 0);
        let mut is = |rate: u16| {
            let from = edge;
            edge += rate;
            (from..edge).contains(&fate)
        };
        let [lost, repeated, swapped, damaged, cut] =
            [rates.lost, rates.repeated, rates.swapped, rates.damaged, rates.cut].map(&mut is);
        if swapped && self.held[direction].is_none() {
            self.held[direction] = Some(frame);
            return Vec::new();
        }
        let mut arrives = Vec::new();
        if damaged {
            let at = self.below(frame.len());
            frame[at] ^= 1 << self.below(8);
        }
        if cut {
            frame.truncate(self.below(frame.len()));
        }
        if repeated {
            arrives.push(frame.clone());
        }
        if !lost {
            arrives.push(frame);
        }
        arrives.extend(self.held[direction].take());
        arrives
    }
}

impl<Q> Faults<Q> {
    pub(crate) fn new(inner: Q, rates: Rates, seed: u64) -> Self {
        let state = State { random: seed | 1, held: [None, None], coming: VecDeque::new() };
        Self { inner, rates, state: Rc::new(RefCell::new(state)) }
    }
}

impl<Q: Queue> Queue for Faults<Q> {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        loop {
            if let Some(next) = state.coming.pop_front() {
                frame[..next.len()].copy_from_slice(&next);
                return Ok(next.len());
            }
            let length = self.inner.read(frame)?;
            let arrives = state.pass(&self.rates, 0, frame[..length].to_vec());
            state.coming.extend(arrives);
        }
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        let arrives = self.state.borrow_mut().pass(&self.rates, 1, frame.to_vec());
        arrives.iter().try_for_each(|frame| self.inner.write(frame))
    }
}
