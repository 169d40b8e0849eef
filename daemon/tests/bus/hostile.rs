//! What hostile callers try.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use proxyvpn_dbus::names::{MANAGER, MANAGER_PATH};
use tokio::time::timeout;

use crate::world::{Options, Polkit, World, call, client, manager, options, run};

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
        let sent = timeout(
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
        manager(&carol, "Status", &()).await.unwrap();
        let polkit = Polkit::find(&carol).await;
        polkit.stop();
        // Fewer than the bus itself would refuse.
        let mut flood: FuturesUnordered<_> = (0..100).map(|_| manager(&mallory, "Reconnect", &())).collect();
        for _ in 0..96 {
            let error = flood.next().await.unwrap().unwrap_err();
            assert!(error.starts_with("org.proxyvpn1.Error.LimitExceeded"), "{error}");
        }
        let options = (Options::new(),);
        let mut other = pin!(manager(&carol, "Disconnect", &options));
        assert!(timeout(Duration::from_millis(500), &mut other).await.is_err(), "refused for somebody else's flood");
        polkit.go_on();
        other.await.unwrap();
        while let Some(answer) = flood.next().await {
            let error = answer.unwrap_err();
            assert!(error.contains("NotAuthorized"), "{error}");
        }
        assert!(
            manager(&mallory, "Reconnect", &()).await.unwrap_err().contains("NotAuthorized"),
            "the room comes back"
        );
    });
}
