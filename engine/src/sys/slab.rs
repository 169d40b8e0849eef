//! Equal blocks of memory in one mapping. A block costs nothing until it is touched and is given back to the kernel when it is
//! returned: a flow that moved no bytes keeps a page or two, not its whole rings.

use std::cell::RefCell;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

/// A mapping of `count` blocks. Belongs to one thread.
#[derive(Debug, Clone)]
pub(crate) struct Slab(Rc<Mapping>);

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    block: usize,
    count: usize,
    free: RefCell<Free>,
}

/// Blocks from `fresh` on were never handed out; `returned` were and came back.
#[derive(Debug, Default)]
struct Free {
    fresh: usize,
    returned: Vec<usize>,
}

impl Slab {
    /// Reserves address space for `count` blocks of at least `block` bytes (rounded up to whole pages).
    ///
    /// # Errors
    /// mmap(2)'s, or `InvalidInput` when the size overflows or is zero.
    pub(crate) fn new(block: usize, count: usize) -> io::Result<Self> {
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
        Ok(Self(Rc::new(Mapping { base, block, count, free: RefCell::default() })))
    }

    /// Blocks that are out.
    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        let free = self.0.free.borrow();
        free.fresh - free.returned.len()
    }

    /// Takes a zeroed block, or `None` when all are out.
    pub(super) fn take(&self) -> Option<Block> {
        let mut free = self.0.free.borrow_mut();
        let index = match free.returned.pop() {
            Some(index) => index,
            None if free.fresh < self.0.count => {
                free.fresh += 1;
                free.fresh - 1
            }
            None => return None,
        };
        Some(Block { mapping: Rc::clone(&self.0), index })
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
}

impl Block {
    /// Start and length of the block's memory; valid while the block lives.
    pub(super) fn memory(&self) -> (NonNull<u8>, usize) {
        // SAFETY: `index < count`, so the offset stays inside the mapping, whose size fits an `isize`.
        let start = unsafe { self.mapping.base.add(self.index * self.mapping.block) };
        (start, self.mapping.block)
    }

    /// Gives the pages of the second half back; it then reads as zeroes.
    pub(super) fn discard_second_half(&self) {
        let (_, length) = self.memory();
        let start = (length / 2).next_multiple_of(rustix::param::page_size()).min(length);
        self.discard(start, length - start);
    }

    fn discard(&self, offset: usize, length: usize) {
        let (start, _) = self.memory();
        // SAFETY: both callers stay inside this block. What is wiped holds no data that anyone still reads: the block is being
        // dropped, or its holder says that the half is empty.
        unsafe { libc::madvise(start.as_ptr().add(offset).cast(), length, libc::MADV_DONTNEED) };
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.discard(0, self.mapping.block);
        self.mapping.free.borrow_mut().returned.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

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
        let slab = Slab::new(5000, 2).unwrap();
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
    fn a_block_outlives_the_handle_it_came_from() {
        let slab = Slab::new(4096, 1).unwrap();
        let block = slab.take().unwrap();
        drop(slab);
        fill(&block, 7);
        assert_eq!(byte(&block, 4095), 7);
    }

    #[test]
    fn a_size_that_overflows_is_refused() {
        assert!(Slab::new(usize::MAX / 2, 4).is_err());
        assert!(Slab::new(4096, 0).is_err());
    }
}
