//! What honest callers see: profiles, passwords, signals, the log.

use std::collections::HashMap;

use futures_util::StreamExt as _;
use proxyvpn_dbus::client::{ManagerProxy, ProfileProxy, TorVmProxy};
use proxyvpn_dbus::names::{MANAGER, MANAGER_PATH, TORVM, TORVM_PATH, profile_path};
use proxyvpn_dbus::types::{Bootstrap, LogRecord, State};
use proxyvpnd::machine::View;
use zbus::fdo::{ManagedObjects, ObjectManagerProxy, PropertiesProxy};
use zbus::{OwnedObjectPath, Variant};

use crate::world::{Options, PROFILE, World, call, client, manager, options, pipe, run};

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn profiles_come_and_go_as_objects() {
    run("callers::profiles_come_and_go_as_objects", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        let objects =
            ObjectManagerProxy::builder(&alice).destination("org.proxyvpn1").path(MANAGER_PATH).build().await.unwrap();
        let mut added = objects.receive_interfaces_added().await.unwrap();
        let mut removed = objects.receive_interfaces_removed().await.unwrap();
        let import = async |text: &str, more: Options| manager(&alice, "ImportProfile", &(pipe(text), more)).await;

        let path: OwnedObjectPath =
            import(PROFILE, options([("name", "new-1".into())])).await.unwrap().body().deserialize().unwrap();
        assert_eq!(path.as_str(), "/org/proxyvpn1/profile/new_2d1");
        assert_eq!(added.next().await.unwrap().args().unwrap().object_path.as_str(), path.as_str());
        let profile = ProfileProxy::builder(&alice).path(path.as_str()).build().await.unwrap();
        assert_eq!(profile.name().await.unwrap(), "new-1");
        assert_eq!(profile.upstream().await.unwrap(), "http://proxy.example:8080");
        assert_eq!(profile.origin().await.unwrap(), "imported");
        assert_eq!(profile.text().await.unwrap(), PROFILE);
        let managed: ManagedObjects = objects.get_managed_objects().await.unwrap();
        assert!(managed.contains_key(&path) && managed.len() >= 3, "{managed:?}");

        let error = import(PROFILE, options([("name", "new-1".into())])).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.ProfileExists"), "{error}");
        let other = PROFILE.replace("8080", "3128");
        import(&other, options([("name", "new-1".into()), ("replace", true.into())])).await.unwrap();
        assert_eq!(removed.next().await.unwrap().args().unwrap().object_path.as_str(), path.as_str());
        assert_eq!(added.next().await.unwrap().args().unwrap().object_path.as_str(), path.as_str());

        let error = import("[upstream]\nurll = \"x\"\n", options([("name", "typo".into())])).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.InvalidProfile: typo.toml:2:1"), "{error}");
        let error = import(&"#".repeat(65 * 1024), options([("name", "long".into())])).await;
        assert!(error.unwrap_err().starts_with("org.proxyvpn1.Error.InvalidProfile"));

        world.view.send_replace(View { state: State::Connected, profile: "new-1".to_owned(), ..View::default() });
        let error = manager(&alice, "RemoveProfile", &("new-1",)).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.ProfileProtected"), "{error}");
        world.view.send_replace(View::default());
        manager(&alice, "RemoveProfile", &("new-1",)).await.unwrap();
        assert_eq!(removed.next().await.unwrap().args().unwrap().object_path.as_str(), path.as_str());
        let error = manager(&alice, "RemoveProfile", &("new-1",)).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.NoSuchProfile"), "{error}");
        assert!(
            call(
                &alice,
                &profile_path("new-1"),
                "org.freedesktop.DBus.Properties",
                "GetAll",
                &("org.proxyvpn1.Profile",)
            )
            .await
            .is_err()
        );
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn what_tor_has_is_shown_and_bridges_are_set() {
    run("callers::what_tor_has_is_shown_and_bridges_are_set", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        let tor = TorVmProxy::builder(&alice).cache_properties(zbus::proxy::CacheProperties::No).build().await.unwrap();
        assert_eq!(tor.bootstrap().await.unwrap(), Bootstrap::default());
        let properties =
            PropertiesProxy::builder(&alice).destination("org.proxyvpn1").path(TORVM_PATH).build().await.unwrap();
        let mut changed = properties.receive_properties_changed().await.unwrap();
        let bootstrap =
            Bootstrap { percent: 45, summary: "Loading relay descriptors".to_owned(), ..Bootstrap::default() };
        let view = View { backend: "torvm", bootstrap: bootstrap.clone(), transport: "obfs4", ..View::default() };
        world.view.send_replace(view);
        let signal = changed.next().await.unwrap();
        let args = signal.args().unwrap();
        assert_eq!(args.interface_name.as_str(), TORVM);
        let mut names: Vec<_> = args.changed_properties.keys().copied().collect();
        names.sort_unstable();
        assert_eq!(names, ["Bootstrap", "Transport"]);
        assert_eq!(tor.bootstrap().await.unwrap(), bootstrap);
        let status = ManagerProxy::new(&alice).await.unwrap().status().await.unwrap();
        for name in ["Bootstrap", "Accelerator", "AcceleratorReason", "Transport"] {
            assert!(status.contains_key(name), "{name}");
        }
        tor.new_identity().await.unwrap();
        assert!(tor.circuits().await.unwrap().is_empty());
        assert_eq!(world.take_notes(), ["new identity", "circuits"]);

        let set = async |name: &str, transport: &str, lines: &[&str]| {
            call(&alice, TORVM_PATH, TORVM, "SetBridges", &(name, transport, lines)).await.map(drop)
        };
        let text = "# kept\nbackend = \"torvm\"\n";
        manager(&alice, "ImportProfile", &(pipe(text), options([("name", "tor".into())]))).await.unwrap();
        let proxied = "backend = \"torvm\"\n[upstream]\nurl = \"http://proxy.example:3128\"\n";
        manager(&alice, "ImportProfile", &(pipe(proxied), options([("name", "proxied".into())]))).await.unwrap();
        let snowflake = "snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b.example:3478";
        set("tor", "snowflake", &[snowflake]).await.unwrap();
        let line = "obfs4 192.0.2.1:443 cert=a";
        set("tor", "obfs4", &[line]).await.unwrap();
        let profile = ProfileProxy::builder(&alice).path(profile_path("tor")).build().await.unwrap();
        let now = profile.text().await.unwrap();
        assert!(now.starts_with(text) && now.contains(line), "{now}");
        for (name, transport, lines, error) in [
            ("tor", "obfs4", vec!["obfs4 192.0.2.1:443 cert=a\n%include /etc/passwd"], "InvalidOption"),
            ("tor", "snowflake", vec![], "InvalidOption"),
            ("proxied", "snowflake", vec![snowflake], "InvalidProfile"),
            ("tor", "none", vec!["192.0.2.1:443"; 17], "LimitExceeded"),
            ("work", "none", vec!["192.0.2.1:443"], "InvalidProfile"),
            ("missing", "none", vec![], "NoSuchProfile"),
        ] {
            let said = set(name, transport, &lines).await.unwrap_err();
            assert!(said.starts_with(&format!("org.proxyvpn1.Error.{error}: ")), "{said}");
        }
        assert_eq!(profile.text().await.unwrap(), now, "what is refused changes nothing");
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn a_password_reaches_the_machine_and_nobody_else() {
    run("callers::a_password_reaches_the_machine_and_nobody_else", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        let request = |fd: zbus::Fd<'static>| {
            options([
                ("proxy-url", "http://proxy.example:8080".into()),
                ("username", "u".into()),
                ("password", Variant::from(fd)),
            ])
        };
        manager(&alice, "Connect", &("", request(pipe("hunter2\n")))).await.unwrap();
        assert_eq!(world.take_notes(), ["connect adhoc http://proxy.example:8080 Some(\"hunter2\")"]);

        let (reader, _never_closed) = std::io::pipe().unwrap();
        let start = std::time::Instant::now();
        let fd = std::os::fd::OwnedFd::from(reader).into();
        let body = ("", request(fd));
        let waiting = manager(&alice, "Connect", &body);
        let other = async {
            let carol = client("carol").await;
            manager(&carol, "Status", &()).await.unwrap();
            start.elapsed()
        };
        let (error, status) = tokio::join!(waiting, other);
        assert!(error.unwrap_err().starts_with("org.proxyvpn1.Error.InvalidOption: option password"));
        assert!(start.elapsed().as_secs() < 4 && status.as_secs() < 1, "{:?} {status:?}", start.elapsed());
        assert!(world.take_notes().is_empty());
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn changes_are_told_once_and_in_order() {
    run("callers::changes_are_told_once_and_in_order", || async {
        let world = World::new().await;
        let bob = client("bob").await;
        let proxy = ManagerProxy::new(&bob).await.unwrap();
        assert_eq!(proxy.state().await.unwrap(), "disconnected");
        let properties =
            PropertiesProxy::builder(&bob).destination("org.proxyvpn1").path(MANAGER_PATH).build().await.unwrap();
        let mut changed = properties.receive_properties_changed().await.unwrap();
        let mut transitions = proxy.receive_transition().await.unwrap();
        world.view.send_replace(View { state: State::Connecting, phase: "probe-upstream", ..View::default() });
        let signal = changed.next().await.unwrap();
        let args = signal.args().unwrap();
        assert_eq!(args.interface_name.as_str(), MANAGER);
        let mut names: Vec<_> = args.changed_properties.keys().copied().collect();
        names.sort_unstable();
        assert_eq!(names, ["Phase", "State"]);
        let transition = transitions.next().await.unwrap();
        assert_eq!(
            (transition.args().unwrap().state, transition.args().unwrap().phase),
            ("connecting", "probe-upstream")
        );

        world.view.send_modify(|view| view.blocking = true);
        assert_eq!(
            changed.next().await.unwrap().args().unwrap().changed_properties,
            HashMap::from([("Blocking", true.into())])
        );
        world.view.send_modify(|view| view.device = "pvpn0".to_owned());
        let more = tokio::time::timeout(std::time::Duration::from_millis(200), changed.next()).await;
        assert!(more.is_err(), "the device is no property");
        let more = tokio::time::timeout(std::time::Duration::from_millis(10), transitions.next()).await;
        assert!(more.is_err(), "neither state nor phase nor reason changed");

        let status = proxy.status().await.unwrap();
        for name in [
            "Version",
            "State",
            "Phase",
            "Reason",
            "Backend",
            "Profile",
            "Since",
            "Progress",
            "Blocking",
            "Health",
            "Statistics",
            "Firewall",
            "Upstream",
            "Device",
            "Resolvers",
        ] {
            assert!(status.contains_key(name), "{name}");
        }
        assert_eq!(proxy.statistics().await.unwrap(), HashMap::from([("flows".to_owned(), 3)]));
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn the_log_goes_to_those_who_may_read_it() {
    run("callers::the_log_goes_to_those_who_may_read_it", || async {
        let world = World::new().await;
        let record = |message: &str| LogRecord {
            time: 1,
            level: "info".to_owned(),
            target: "test".to_owned(),
            message: message.to_owned(),
        };
        world.log.push(record("before"));
        let alice = client("alice").await;
        let bob = client("bob").await;
        let to_alice = ManagerProxy::new(&alice).await.unwrap();
        let to_bob = ManagerProxy::new(&bob).await.unwrap();
        let mut alices = to_alice.receive_log_entry().await.unwrap();
        let mut bobs = to_bob.receive_log_entry().await.unwrap();
        assert!(to_bob.get_log(0).await.is_err());
        assert!(to_alice.get_log(0).await.unwrap().contains(&record("before")));
        to_alice.get_log(1).await.unwrap();
        world.log.push(record("after"));
        assert_eq!(alices.next().await.unwrap().args().unwrap().record, record("after"));
        let wait = std::time::Duration::from_millis(300);
        assert!(
            tokio::time::timeout(wait, alices.next()).await.is_err(),
            "a second GetLog does not double the records"
        );
        assert!(tokio::time::timeout(wait, bobs.next()).await.is_err(), "polkit refused bob the log");

        // 32 may follow; who leaves makes room.
        let mut others = Vec::new();
        for _ in 0..31 {
            let other = client("alice").await;
            manager(&other, "GetLog", &(0_u32,)).await.unwrap();
            others.push(other);
        }
        let late = client("alice").await;
        let error = manager(&late, "GetLog", &(0_u32,)).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.LimitExceeded"), "{error}");
        others.pop().unwrap().close().await.unwrap();
        while manager(&late, "GetLog", &(0_u32,)).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn only_root_imports_a_profile_that_names_a_password() {
    run("callers::only_root_imports_a_profile_that_names_a_password", || async {
        let _world = World::new().await;
        let text =
            "[upstream]\nurl = \"http://me@mine.example:8080\"\npassword-file = \"/etc/proxyvpn/other.secret\"\n";
        let import = async |user: &str| {
            let client = client(user).await;
            manager(&client, "ImportProfile", &(pipe(text), options([("name", "mine".into())]))).await
        };
        let error = import("alice").await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.NotAuthorized: only root"), "{error}");
        import("root").await.unwrap();
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn the_log_is_verbose_for_one_connection() {
    run("callers::the_log_is_verbose_for_one_connection", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        let verbose = || {
            let now = world.log.set_verbose(false);
            world.log.set_verbose(now);
            now
        };
        let request = options([("proxy-url", "http://proxy.example:8080".into()), ("verbose", true.into())]);
        manager(&alice, "Connect", &("", request)).await.unwrap();
        world.view.send_replace(View { state: State::Connected, ..View::default() });
        manager(&alice, "Status", &()).await.unwrap();
        assert!(verbose());
        world.view.send_replace(View::default());
        for _ in 0..100 {
            if !verbose() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the log stays verbose");
    });
}
