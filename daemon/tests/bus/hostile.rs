//! What hostile callers try.

use std::time::{Duration, Instant};

use proxyvpn_dbus::names::{MANAGER, MANAGER_PATH};

use crate::world::{Options, World, call, client, manager, options, run};

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn huge_arguments_cost_nothing() {
    run("hostile::huge_arguments_cost_nothing", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        for size in [65, 60_000, 31 * 1024 * 1024] {
            let name = "x".repeat(size);
            for method in ["Connect", "Plan", "Diagnose"] {
                let error = manager(&alice, method, &(&name, Options::new())).await.unwrap_err();
                assert!(error.starts_with("org.proxyvpn1.Error.LimitExceeded"), "{method} {size}: {}", &error[..80]);
            }
            let error = manager(&alice, "RemoveProfile", &(&name,)).await.unwrap_err();
            assert!(error.starts_with("org.proxyvpn1.Error.LimitExceeded"), "{size}: {}", &error[..80]);
        }
        // Before polkit is asked: what waits for a person must not hold memory.
        let big = client("mallory").await;
        let error = manager(&big, "RemoveProfile", &("x".repeat(65 * 1024),)).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.LimitExceeded"), "{error}");
        // The bus itself ends a connection that sends this.
        let name = "x".repeat(64 * 1024 * 1024);
        let body = (&name, Options::new());
        let sent = tokio::time::timeout(
            Duration::from_secs(10),
            big.call_method(Some("org.proxyvpn1"), MANAGER_PATH, Some(MANAGER), "Connect", &body),
        );
        assert!(!matches!(sent.await, Ok(Ok(_))));
        manager(&alice, "Status", &()).await.unwrap();
        assert!(world.take_notes().is_empty());
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn wrong_types_members_and_interfaces_are_errors() {
    run("hostile::wrong_types_members_and_interfaces_are_errors", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        for (method, result) in [
            ("Connect", manager(&alice, "Connect", &(1_u32,)).await),
            ("Disconnect", manager(&alice, "Disconnect", &()).await),
            ("GetLog", manager(&alice, "GetLog", &("x",)).await),
        ] {
            assert!(result.unwrap_err().contains("InvalidArgs"), "{method}");
        }
        assert!(manager(&alice, "NoSuchMethod", &(true,)).await.unwrap_err().contains("UnknownMethod"));
        assert!(call(&alice, MANAGER_PATH, "org.proxyvpn1.Secret", "X", &()).await.is_err());
        let error = manager(&alice, "Disconnect", &(options([("force", true.into())]),)).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.InvalidOption") && error.contains("force"), "{error}");
        let error = manager(&alice, "Connect", &("missing", Options::new())).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.NoSuchProfile"), "{error}");
        let error = manager(&alice, "Connect", &("", Options::new())).await.unwrap_err();
        assert!(error.starts_with("org.proxyvpn1.Error.InvalidOption"), "{error}");
        assert!(world.take_notes().is_empty());
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn a_flood_of_one_caller_leaves_room_for_others() {
    run("hostile::a_flood_of_one_caller_leaves_room_for_others", || async {
        let _world = World::new().await;
        let mallory = client("mallory").await;
        let carol = client("carol").await;
        // Fewer than the bus itself would refuse.
        let flood = futures_util::future::join_all(
            (0..100).map(|_| async { manager(&mallory, "Reconnect", &()).await.map(drop).unwrap_err() }),
        );
        let other = async {
            let start = Instant::now();
            manager(&carol, "Status", &()).await.unwrap();
            start.elapsed()
        };
        let (errors, waited) = tokio::join!(flood, other);
        let over = errors.iter().filter(|error| error.starts_with("org.proxyvpn1.Error.LimitExceeded")).count();
        assert!(over > 0, "100 questions at once were all asked");
        assert_eq!(errors.iter().filter(|error| error.contains("NotAuthorized")).count(), 100 - over);
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        assert!(
            manager(&mallory, "Reconnect", &()).await.unwrap_err().contains("NotAuthorized"),
            "the room comes back"
        );
    });
}
