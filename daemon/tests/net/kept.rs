//! The tunnel device outlives the daemon where somebody keeps its queues.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxyvpnd::net::{Keep, Keeping, Network, Owned, Stage};
use socket2::{Domain, Socket, Type};

use crate::world::{World, desired, sh};

/// Keeps queues as systemd does.
#[derive(Debug, Default)]
struct Store(Mutex<Vec<OwnedFd>>);

impl Store {
    fn all(&self) -> Vec<OwnedFd> {
        self.0.lock().unwrap().iter().map(|fd| fd.try_clone().unwrap()).collect()
    }
}

impl Keep for Store {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        if name == Keeping::TUNNEL {
            self.0.lock().unwrap().push(fd.try_clone_to_owned()?);
        }
        Ok(())
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        assert_eq!(name, Keeping::TUNNEL);
        self.0.lock().unwrap().clear();
        Ok(())
    }
}

fn index() -> String {
    sh("cat /sys/class/net/pvpn0/ifindex 2>/dev/null || ip -o link show pvpn0 2>/dev/null | cut -d: -f1 || true")
}

/// Begins to connect, without an end. Which address is local tells where it goes.
fn begin() -> Socket {
    let to: SocketAddr = "203.0.113.9:443".parse().unwrap();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    assert_eq!(socket.connect(&to.into()).unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
    socket
}

fn packets(fds: &[OwnedFd]) -> usize {
    let mut frame = vec![0; 70_000];
    fds.iter().map(|fd| std::iter::from_fn(|| rustix::io::read(fd, &mut frame).ok()).count()).sum()
}

async fn daemon(world: &World, store: &Arc<Store>) -> Network {
    let (tunnel, store) = (store.all(), Arc::clone(store) as Arc<dyn Keep>);
    Network::open(&world.state, Keeping { store: Some(store), tunnel, ..Keeping::default() }).await.unwrap()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_next_daemon_goes_on_with_the_device() {
    let world = World::new();
    world.host.run_async(async || {
        for queues in [1, 2] {
            let (desired, store) = (desired(), Arc::new(Store::default()));
            let tunnel = desired.tunnel.as_ref().unwrap();
            let mut first = daemon(&world, &store).await;
            assert!(!first.has_tunnel(tunnel, queues).await.unwrap());
            let fds = first.create_tunnel(tunnel, queues).await.unwrap();
            for stage in [Stage::Firewall, Stage::Routes] {
                first.apply(stage, &desired).await.unwrap();
            }
            let before = index();

            // The daemon is killed. What connects meanwhile waits.
            drop((first, fds));
            let waits = begin();
            let mut second = daemon(&world, &store).await;
            assert!(second.has_tunnel(tunnel, queues).await.unwrap());
            assert!(!second.has_tunnel(tunnel, queues + 1).await.unwrap());
            second.apply(Stage::Routes, &desired).await.unwrap();
            second.end_tunnelled(tunnel).await;
            let fds = second.create_tunnel(tunnel, queues).await.unwrap();
            assert_eq!((index(), store.all().len()), (before.clone(), queues), "the same device, kept as before");
            assert!(packets(&fds) > 0, "its SYN is there");
            assert!(waits.take_error().unwrap().is_none());

            // Another number of queues: another device.
            drop((second, fds));
            let mut third = daemon(&world, &store).await;
            let fds = third.create_tunnel(tunnel, 3 - queues).await.unwrap();
            assert!(index() != before && store.all().len() == 3 - queues);

            // Nothing of it is left when it is not wanted any more, though somebody still holds it.
            third.drop_tunnel().await.unwrap();
            assert_eq!((index(), store.all().len()), (String::new(), 0));
            assert!(third.clean_up(Owned::Unexpected).await.errors.is_empty());
            drop(fds);
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_next_daemon_goes_on_with_a_device_of_the_same_kind_alone() {
    let world = World::new();
    world.host.run_async(async || {
        let (plain, store) = (desired().tunnel.unwrap(), Arc::new(Store::default()));
        let routed = crate::router::tunnel("pvpn0");
        let mut first = daemon(&world, &store).await;
        let fds = first.create_tunnel(&routed, 1).await.unwrap();
        let before = index();
        drop((first, fds));
        let mut second = daemon(&world, &store).await;
        assert!(second.has_tunnel(&routed, 1).await.unwrap());
        assert!(!second.has_tunnel(&plain, 1).await.unwrap());
        let fds = second.create_tunnel(&routed, 1).await.unwrap();
        assert_eq!((index(), fds.len(), store.all().len()), (before.clone(), 1, 1), "the same device, kept as before");
        drop((second, fds));
        for (tunnel, kind) in [(&plain, "type tun"), (&routed, "type tap")] {
            let mut next = daemon(&world, &store).await;
            assert!(!next.has_tunnel(tunnel, 1).await.unwrap());
            let fds = next.create_tunnel(tunnel, 1).await.unwrap();
            assert!(index() != before && sh("ip -d link show pvpn0").contains(kind), "{kind}");
            drop((next, fds));
        }
        let mut last = daemon(&world, &store).await;
        assert!(last.clean_up(Owned::Unexpected).await.errors.is_empty());
        assert_eq!((index(), store.all().len()), (String::new(), 0));
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_a_store_it_goes_with_the_daemon() {
    let world = World::new();
    world.host.run_async(async || {
        let (desired, store) = (desired(), Arc::new(Store::default()));
        let mut network = daemon(&world, &store).await;
        let fds = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 1).await.unwrap();
        store.forget(Keeping::TUNNEL).unwrap();
        drop((network, fds));
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(index(), "");
    });
}
