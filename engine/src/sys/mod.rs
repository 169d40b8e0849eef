//! The only place with `unsafe`: memory that the kernel backs on first touch, and TUN ioctls.
#![allow(unsafe_code)]

mod connection;
mod slab;
mod tun;

pub(crate) use connection::Connection;
pub(crate) use slab::Slab;
pub(crate) use tun::TunQueue;
