//! Which backend is chosen, by whom.

use proxyvpnd::net::firewall::{Abilities, Backend, Error, compile};
use rustix::{
    process::Uid,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities, set_thread_res_uid,
    },
};

use crate::state::NFTNL;
use crate::world::{World, desired, devices, opted_in, sh};

fn only(capability: CapabilitySet) {
    let sets = CapabilitySets { effective: capability, permitted: capability, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).unwrap();
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_capability_is_enough_and_nothing_is_left() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let before = sh("nft list ruleset");
        assert_eq!(Backend::choose().unwrap(), NFTNL);
        assert_eq!(sh("nft list ruleset"), before);
    });
    // As the unit runs it: a user of its own with CAP_NET_ADMIN, without a way to become root.
    world.host.run(|| {
        set_keep_capabilities(true).unwrap();
        let user = Uid::from_raw(65534);
        set_thread_res_uid(user, user, user).unwrap();
        only(CapabilitySet::NET_ADMIN);
        let backend = Backend::choose().unwrap();
        assert_eq!(backend, NFTNL);
        let many: Vec<_> = (1..=1024)
            .map(|port| ("192.0.2.1:22".parse().unwrap(), std::net::SocketAddr::from(([192, 0, 2, 2], port))))
            .collect();
        backend.apply(&compile(&desired(), &many, &devices())).unwrap();
        assert!(backend.present().unwrap());
        backend.remove().unwrap();
        assert!(!backend.present().unwrap());
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_the_capability_root_falls_back_and_others_are_told() {
    opted_in();
    let world = World::new();
    // Root gets the capability back when it runs a program.
    world.host.run(|| {
        only(capabilities(None).unwrap().permitted - CapabilitySet::NET_ADMIN);
        let backend = Backend::choose().unwrap();
        assert!(matches!(&backend, Backend::Nft(path, Abilities::ALL) if path == "/usr/sbin/nft"), "{backend:?}");
        backend.apply(&compile(&desired(), &[], &devices())).unwrap();
        assert!(backend.present().unwrap());
        backend.remove().unwrap();
        assert!(matches!(NFTNL.apply(&compile(&desired(), &[], &devices())), Err(Error::Privilege)));
        assert!(matches!(NFTNL.remove(), Err(Error::Privilege)));
    });
    world.host.run(|| {
        let user = Uid::from_raw(65534);
        set_thread_res_uid(user, user, user).unwrap();
        let error = Backend::choose().unwrap_err().to_string();
        assert!(error.contains("CAP_NET_ADMIN") && error.contains("systemd unit"), "{error}");
        assert!(!error.contains("iptables"), "{error}");
    });
}
