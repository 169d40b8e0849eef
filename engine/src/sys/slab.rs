//! Equal blocks of memory in one mapping. A block costs nothing until it is touched and is given back to the kernel when it is
//! returned, but for a few that were hardly touched: the next short flows have them without a system call and a page fault.

use std::cell::{Cell, RefCell};
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use crate::memory::Memory;

/// So many returned blocks keep their first pages.
const WARM: usize = 32;
/// More bytes than this in a half, and the block is not worth keeping.
const SMALL: usize = 4096;

/// A mapping of `count` blocks. Belongs to one thread.
#[derive(Debug, Clone)]
pub(crate) struct Slab(Rc<Mapping>);

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    block: usize,
    count: usize,
    free: RefCell<Free>,
    memory: Arc<Memory>,
}

/// Blocks from `fresh` on were never handed out; the others were and came back. All are zeroed.
#[derive(Debug, Default)]
struct Free {
    fresh: usize,
    returned: Vec<usize>,
    warm: Vec<usize>,
}

impl Slab {
    /// Reserves address space for `count` blocks of at least `block` bytes (rounded up to whole pages). What they hold is counted in
    /// `memory`, the few that are kept aside.
    ///
    /// # Errors
    /// mmap(2)'s, or `InvalidInput` when the size overflows or is zero.
    pub(crate) fn new(block: usize, count: usize, memory: Arc<Memory>) -> io::Result<Self> {
        let block = block.next_multiple_of(rustix::param::page_size());
        let size = block.checked_mul(count).filter(|size| *size > 0 && isize::try_from(*size).is_ok());
        let size = size.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the range is the mapping just made. A failure (kernel without huge pages) changes nothing.
        unsafe { libc::madvise(base.as_ptr().cast(), size, libc::MADV_NOHUGEPAGE) };
        Ok(Self(Rc::new(Mapping { base, block, count, free: RefCell::default(), memory })))
    }

    /// Blocks that are out.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn taken(&self) -> usize {
        let free = self.0.free.borrow();
        free.fresh - free.returned.len() - free.warm.len()
    }

    /// Takes a zeroed block, or `None` when all are out.
    pub(super) fn take(&self) -> Option<Block> {
        let mut free = self.0.free.borrow_mut();
        let index = match free.warm.pop().or_else(|| free.returned.pop()) {
            Some(index) => index,
            None if free.fresh < self.0.count => {
                free.fresh += 1;
                free.fresh - 1
            }
            None => return None,
        };
        Some(Block { mapping: Rc::clone(&self.0), index, touched: Cell::new(None), held: Cell::new([0; 2]) })
    }

    /// Pages that are backed by memory.
    #[cfg(test)]
    pub(crate) fn resident(&self) -> usize {
        let (length, page) = (self.0.block * self.0.count, rustix::param::page_size());
        let mut pages = vec![0_u8; length.div_ceil(page)];
        // SAFETY: the range is the mapping, which lives; `pages` has a byte for each of its pages.
        unsafe { libc::mincore(self.0.base.as_ptr().cast(), length, pages.as_mut_ptr()) };
        pages.iter().filter(|page| *page & 1 == 1).count()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and no block is left: each holds the `Rc` that is being dropped.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.block * self.count) };
    }
}

/// One block, exclusively its holder's until dropped.
#[derive(Debug)]
pub(super) struct Block {
    mapping: Rc<Mapping>,
    index: usize,
    touched: Cell<Option<(usize, usize)>>,
    /// Bytes of each half's pages that may be backed, as counted.
    held: Cell<[usize; 2]>,
}

/// A half of a block.
#[derive(Debug, Clone, Copy)]
pub(super) enum Half {
    First,
    Second,
}

impl Block {
    /// Start and length of the block's memory; valid while the block lives.
    pub(super) fn memory(&self) -> (NonNull<u8>, usize) {
        // SAFETY: `index < count`, so the offset stays inside the mapping, whose size fits an `isize`.
        let start = unsafe { self.mapping.base.add(self.index * self.mapping.block) };
        (start, self.mapping.block)
    }

    /// The holder's word that what it wrote to `half` since that was last discarded is at most `bytes` in a row, which begin anywhere
    /// in a page when `astride`.
    pub(super) fn reaches(&self, half: Half, bytes: usize, astride: bool) {
        let more = self.lacks(half, bytes, astride);
        if more > 0 {
            let mut held = self.held.get();
            held[half as usize] += more;
            self.hold(held);
        }
    }

    /// How many bytes more than now the block would hold then.
    pub(super) fn lacks(&self, half: Half, bytes: usize, astride: bool) -> usize {
        let page = rustix::param::page_size();
        let bytes = if astride && bytes > 0 { bytes.saturating_add(page) } else { bytes }.min(self.half());
        let held = self.held(half);
        if bytes > held { bytes.next_multiple_of(page) - held } else { 0 }
    }

    fn hold(&self, held: [usize; 2]) {
        let before = self.held.replace(held);
        self.mapping.memory.change(before.iter().sum(), held.iter().sum());
    }

    /// Bytes of `half` that can be written without holding more.
    pub(super) fn held(&self, half: Half) -> usize {
        self.held.get()[half as usize]
    }

    /// False when all blocks hold what they may together.
    pub(super) fn memory_is_left(&self) -> bool {
        !self.mapping.memory.is_exhausted()
    }

    /// Bytes that the block may hold on top of what it does, in whole pages. `None`: it holds more than its share already.
    pub(super) fn spare(&self) -> Option<usize> {
        let (held, full) = (self.held.get().iter().sum(), self.mapping.block);
        let share = self.mapping.memory.share(held, full);
        let page = rustix::param::page_size();
        Some(share.checked_sub(held)? / page * page).filter(|spare| *spare > 0 || share == full)
    }

    /// Gives all pages back; the block then reads as zeroes.
    pub(super) fn discard(&self) {
        self.discard_range(0, self.mapping.block);
        self.hold([0; 2]);
    }

    /// Gives the pages of one half back; it then reads as zeroes.
    pub(super) fn discard_half(&self, half: Half) {
        let (from, to) = match half {
            Half::First => (0, self.half()),
            Half::Second => (self.half(), self.mapping.block),
        };
        self.discard_range(from, to);
        let mut held = self.held.get();
        held[half as usize] = 0;
        self.hold(held);
    }

    /// The holder's word that nothing was written but the first `first` bytes and the first `second` bytes of the second half.
    pub(super) fn touched(&self, first: usize, second: usize) {
        self.touched.set(Some((first, second)));
    }

    /// Length of the first half, and start of the second.
    pub(super) fn half(&self) -> usize {
        self.mapping.block / 2
    }

    /// Whole pages only: one that two halves share stays.
    fn discard_range(&self, from: usize, to: usize) {
        let (start, length) = self.memory();
        let page = rustix::param::page_size();
        let from = from.next_multiple_of(page).min(length);
        let to = to / page * page;
        // SAFETY: the range is inside this block. What is wiped holds no data that anyone still reads: the block is being dropped,
        // or its holder says that the range is empty.
        unsafe { libc::madvise(start.as_ptr().add(from).cast(), to.saturating_sub(from), libc::MADV_DONTNEED) };
    }

    /// Zeroes what was touched if that is little.
    fn wipe(&self) -> bool {
        let Some((first, second)) = self.touched.get().filter(|(a, b)| *a.max(b) <= SMALL) else { return false };
        let (start, length) = self.memory();
        let half = self.half();
        if first > half || second > length - half {
            return false;
        }
        // SAFETY: both ranges are inside this block, as was just checked; it is being dropped, so nobody refers to it.
        unsafe {
            start.as_ptr().write_bytes(0, first);
            start.as_ptr().add(half).write_bytes(0, second);
        }
        true
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let warm = self.mapping.free.borrow().warm.len() < WARM && self.wipe();
        if !warm {
            self.discard_range(0, self.mapping.block);
        }
        self.hold([0; 2]);
        let mut free = self.mapping.free.borrow_mut();
        if warm { &mut free.warm } else { &mut free.returned }.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    fn slab(block: usize, count: usize) -> io::Result<Slab> {
        Slab::new(block, count, Arc::new(Memory::new(usize::MAX)))
    }

    fn fill(block: &Block, byte: u8) {
        let (start, length) = block.memory();
        // SAFETY: the block is ours while it lives, and nothing else refers to it.
        unsafe { start.as_ptr().write_bytes(byte, length) };
    }

    fn byte(block: &Block, at: usize) -> u8 {
        let (start, length) = block.memory();
        assert!(at < length);
        // SAFETY: inside the block, which reads as zero or as `fill` left it.
        unsafe { start.as_ptr().add(at).read() }
    }

    #[test]
    fn blocks_are_bounded_disjoint_and_come_back_zeroed() {
        let slab = slab(5000, 2).unwrap();
        let (a, b) = (slab.take().unwrap(), slab.take().unwrap());
        assert!(slab.take().is_none());
        fill(&a, 1);
        fill(&b, 2);
        assert_eq!((byte(&a, 0), byte(&a, 4999), byte(&b, 0), byte(&b, 4999)), (1, 1, 2, 2));
        drop(a);
        let again = slab.take().unwrap();
        assert_eq!((byte(&again, 0), byte(&again, 4999)), (0, 0));
        assert_eq!(byte(&b, 0), 2);
    }

    #[test]
    fn a_block_that_was_hardly_touched_comes_back_zeroed_too() {
        let slab = slab(8192, 1).unwrap();
        for (first, second) in [(3, 5), (4096, 4096), (0, 4097)] {
            let block = slab.take().unwrap();
            let (start, length) = block.memory();
            for at in [0..first, length / 2..(length / 2 + second).min(length)].into_iter().flatten() {
                // SAFETY: inside the block, which is ours.
                unsafe { start.as_ptr().add(at).write(9) };
            }
            block.touched(first, second);
            drop(block);
            let again = slab.take().unwrap();
            assert!((0..length).all(|at| byte(&again, at) == 0), "{first} {second}");
        }
    }

    #[test]
    fn a_block_outlives_the_handle_it_came_from() {
        let slab = slab(4096, 1).unwrap();
        let block = slab.take().unwrap();
        drop(slab);
        fill(&block, 7);
        assert_eq!(byte(&block, 4095), 7);
    }

    #[test]
    fn a_size_that_overflows_is_refused() {
        assert!(slab(usize::MAX / 2, 4).is_err());
        assert!(slab(4096, 0).is_err());
    }
}
