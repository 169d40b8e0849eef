//! The table belongs to a socket that outlives the daemon.

use std::{
    io,
    net::UdpSocket,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
};

use proxyvpnd::net::{
    Keep, Keeping,
    desired::Desired,
    firewall::{Backend, Error, compile},
};

use crate::{
    state::NFTNL,
    world::{PEER, World, desired, devices, opted_in, sh},
};

/// Keeps descriptors as systemd does.
#[derive(Debug, Default)]
struct Store(Mutex<Vec<OwnedFd>>);

impl Keep for Store {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        assert_eq!(name, Keeping::FIREWALL);
        assert!(!NFTNL.present().unwrap(), "the table is there before its socket is kept");
        self.0.lock().unwrap().push(fd.try_clone_to_owned()?);
        Ok(())
    }

    fn forget(&self, _: &str) -> io::Result<()> {
        unreachable!("the firewall's socket is kept for ever")
    }
}

/// Nobody takes anything.
#[derive(Debug)]
struct Refusing;

impl Keep for Refusing {
    fn keep(&self, _: &str, _: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::TimedOut.into())
    }

    fn forget(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
}

fn owned(store: Arc<dyn Keep>) -> Backend {
    Backend::choose().unwrap().owned(Keeping { store: Some(store), ..Keeping::default() })
}

/// The daemon that comes after.
fn next(firewall: OwnedFd) -> Backend {
    Backend::choose().unwrap().owned(Keeping { firewall: Some(firewall), ..Keeping::default() })
}

/// Whether a datagram to the peer is let out.
fn leaves() -> bool {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.send_to(b"probe", (PEER, 4000)).is_ok()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nobody_else_can_change_it_and_the_next_daemon_goes_on() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        assert!(leaves());
        let store = Arc::new(Store::default());
        let first = owned(Arc::clone(&store) as Arc<dyn Keep>);
        let (rules, others) =
            (compile(&desired(), &[], &devices()), compile(&Desired { tunnel: None, ..desired() }, &[], &devices()));
        first.apply(&rules).unwrap();
        assert!(first.holds(&rules).unwrap() && !leaves());
        sh("nft add table inet other; nft add chain inet other c; nft flush ruleset");
        assert!(!sh("nft list tables").contains("other"), "the flush did flush");
        assert!(first.holds(&rules).unwrap() && !leaves());
        for result in [NFTNL.apply(&others), NFTNL.remove()] {
            assert!(matches!(result, Err(Error::Owned)), "{result:?}");
        }
        sh("! nft delete table inet proxyvpn 2>/dev/null; ! nft flush chain inet proxyvpn postrouting 2>/dev/null");
        assert!(first.holds(&rules).unwrap());

        // The daemon is killed.
        drop(first);
        assert!(NFTNL.present().unwrap() && !leaves());
        assert!(matches!(NFTNL.remove(), Err(Error::Owned)));
        let kept = store.0.lock().unwrap().pop().unwrap();
        let copy = kept.try_clone().unwrap();
        let second = next(kept);
        assert!(second.holds(&rules).unwrap());
        second.apply(&others).unwrap();
        assert!(second.holds(&others).unwrap() && !second.holds(&rules).unwrap() && !leaves());
        second.remove().unwrap();
        assert!(!second.present().unwrap() && leaves());
        // The same socket serves again.
        second.apply(&rules).unwrap();
        assert!(!leaves());

        // Anti-test: it lives by its socket alone.
        drop((second, copy));
        assert!(!NFTNL.present().unwrap() && leaves());
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_a_place_for_the_socket_the_table_is_plain() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let rules = compile(&desired(), &[], &devices());
        let nowhere = || Backend::choose().unwrap().owned(Keeping::default());
        for backend in [nowhere(), owned(Arc::new(Refusing))] {
            assert_eq!(backend, NFTNL);
            backend.apply(&rules).unwrap();
            drop(backend);
            // It stays when the daemon is killed, but anybody can flush it.
            assert!(NFTNL.holds(&rules).unwrap() && !leaves());
            sh("nft flush ruleset");
            assert!(!NFTNL.present().unwrap() && leaves());
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_plain_table_becomes_an_owned_one() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let rules = compile(&desired(), &[], &devices());
        let store = Arc::new(Store::default());
        // Chosen first: the store looks that there is no table yet.
        let backend = owned(Arc::clone(&store) as Arc<dyn Keep>);
        NFTNL.apply(&rules).unwrap();
        assert!(!backend.holds(&rules).unwrap(), "the same rules without an owner");
        backend.apply(&rules).unwrap();
        assert!(backend.holds(&rules).unwrap());
        assert!(matches!(NFTNL.remove(), Err(Error::Owned)));
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_socket_that_was_left_full_or_is_something_else() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let rules = compile(&desired(), &[], &devices());
        let store = Arc::new(Store::default());
        let backend = owned(Arc::clone(&store) as Arc<dyn Keep>);
        backend.apply(&rules).unwrap();
        drop(backend);
        let kept = store.0.lock().unwrap().pop().unwrap();
        // Requests whose answers nobody reads, until the kernel has no room for more: a dump of all tables each.
        let request = [20u32.to_ne_bytes(), [1, 10, 1, 3], [1, 0, 0, 0], [0; 4], [0; 4]].concat();
        for _ in 0..20_000 {
            let _ = rustix::net::send(&kept, &request, rustix::net::SendFlags::DONTWAIT);
        }
        let backend = next(kept);
        assert!(backend.holds(&rules).unwrap());
        backend.remove().unwrap();

        let other = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        assert_eq!(next(other), NFTNL, "what is no socket of the firewall is not used");
    });
}
