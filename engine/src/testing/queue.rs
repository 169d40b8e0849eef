//! The plain device: what is written is kept, what the test puts there is read.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use super::packets::{Sent, read_tcp};
use crate::device::Queue;

/// Both directions of a device. Clones are the same device.
#[derive(Debug, Clone, Default)]
pub(crate) struct Double(Rc<RefCell<State>>);

#[derive(Debug, Default)]
struct State {
    coming: VecDeque<Vec<u8>>,
    written: VecDeque<Vec<u8>>,
    error: Option<i32>,
}

impl Double {
    /// The oldest frame that was written.
    pub(crate) fn next(&self) -> Option<Vec<u8>> {
        self.0.borrow_mut().written.pop_front()
    }

    /// Every frame that was written, as TCP.
    pub(crate) fn take_tcp(&self) -> Vec<Sent> {
        self.0.borrow_mut().written.drain(..).map(|frame| read_tcp(&frame)).collect()
    }

    /// Lets `frame` be read.
    pub(crate) fn put(&self, frame: Vec<u8>) {
        self.0.borrow_mut().coming.push_back(frame);
    }

    /// What writing gives from now on.
    pub(crate) fn fail(&self, errno: Option<i32>) {
        self.0.borrow_mut().error = errno;
    }
}

impl Queue for Double {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        let coming = self.0.borrow_mut().coming.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        frame[..coming.len()].copy_from_slice(&coming);
        Ok(coming.len())
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if let Some(errno) = state.error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        state.written.push_back(frame.to_vec());
        Ok(())
    }
}
