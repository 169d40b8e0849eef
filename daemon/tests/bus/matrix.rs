//! Who may do what: every method and property, for every kind of caller.

use proxyvpn_dbus::names::{MANAGER_PATH, PROFILE_PATH, TORVM_PATH, action};
use proxyvpnd::authority::{Need, method_need, property_action};
use zbus::Connection;
use zbus::fdo::IntrospectableProxy;

use crate::world::{Options, Polkit, World, call, client, manager, options, pipe, run};

const CALLERS: [&str; 6] = ["root", "alice", "bob", "carol", "dave", "mallory"];
const STANDARD: [&str; 3] =
    ["org.freedesktop.DBus.Peer", "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Properties"];

/// What the rules of the test and the defaults of the policy file give. Without logind nobody is local and active.
fn allowed(user: &str, action: &str) -> bool {
    match user {
        "root" | "alice" => true,
        "bob" => action == action::STATUS,
        "carol" => [action::STATUS, action::CONNECT, action::DISCONNECT, action::NEW_IDENTITY].contains(&action),
        "dave" => [action::STATUS, action::CONNECT_ADHOC].contains(&action),
        "mallory" => false,
        other => panic!("{other}"),
    }
}

fn members<'a>(xml: &'a str, kind: &str) -> Vec<&'a str> {
    let open = format!("<{kind} name=\"");
    xml.split(open.as_str()).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

/// Calls with arguments that do no harm; each with the actions that it needs. A method that is not here fails the test.
async fn attempts(
    client: &Connection,
    path: &str,
    interface: &str,
    method: &str,
) -> Vec<(Vec<&'static str>, Result<(), String>)> {
    let none = Options::new();
    let adhoc = || options([("proxy-url", "http://proxy.example:8080".into())]);
    let with_lan =
        || options([("proxy-url", "http://proxy.example:8080".into()), ("lan", vec!["192.168.0.0/16"].into())]);
    macro_rules! attempt {
        ($body:expr) => {
            call(client, path, interface, method, $body).await.map(drop)
        };
    }
    let needed = match method_need(interface, method) {
        Some(Need::Action(action)) => vec![action],
        Some(Need::Arguments) => Vec::new(),
        None => panic!("{interface}.{method} has no action"),
    };
    match method {
        "Connect" | "Plan" | "Diagnose" => vec![
            (vec![action::CONNECT], attempt!(&("work", &none))),
            (vec![action::CONNECT_ADHOC], attempt!(&("work", options([("killswitch", false.into())])))),
            (vec![action::CONNECT_ADHOC], attempt!(&("", adhoc()))),
            (vec![action::CONNECT_ADHOC, action::ALLOW_LAN], attempt!(&("", with_lan()))),
        ],
        "Disconnect" => vec![(needed, attempt!(&(&none,)))],
        "Reconnect" | "Status" | "ListFlows" | "GetManagedObjects" | "NewIdentity" | "Circuits" => {
            vec![(needed, attempt!(&()))]
        }
        "SetBridges" => vec![(needed, attempt!(&("missing", "none", Vec::<&str>::new())))],
        "GetLog" => vec![(needed, attempt!(&(0_u32,)))],
        "ImportProfile" => vec![(needed, attempt!(&(pipe("x = 1"), options([("name", "new".into())]))))],
        "SetLockdown" => vec![(needed.clone(), attempt!(&(true,))), (needed, attempt!(&(false,)))],
        "RemoveProfile" => vec![(needed, attempt!(&("missing",)))],
        other => panic!("the test does not know {other}"),
    }
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn every_method_and_property_asks_polkit_for_every_caller() {
    run("matrix::every_method_and_property_asks_polkit_for_every_caller", || async {
        let _world = World::new().await;
        let profile = format!("{PROFILE_PATH}/work");
        let mut checked = 0;
        for user in CALLERS {
            let client = client(user).await;
            for path in [MANAGER_PATH, TORVM_PATH, profile.as_str()] {
                let introspectable = IntrospectableProxy::builder(&client)
                    .destination("org.proxyvpn1")
                    .path(path)
                    .build()
                    .await
                    .unwrap();
                let xml = introspectable.introspect().await.unwrap();
                for part in xml.split("\n  <interface name=\"").skip(1) {
                    let (interface, rest) = part.split_once('"').unwrap();
                    let body = rest.split("\n  </interface>").next().unwrap();
                    if STANDARD.contains(&interface) {
                        continue;
                    }
                    for method in members(body, "method") {
                        for (needed, result) in attempts(&client, path, interface, method).await {
                            let refused = result
                                .as_ref()
                                .is_err_and(|error| error.starts_with("org.proxyvpn1.Error.NotAuthorized"));
                            let expected = needed.iter().all(|action| allowed(user, action));
                            assert_eq!(!refused, expected, "{user} {interface}.{method} {needed:?}: {result:?}");
                            checked += 1;
                        }
                    }
                    for property in members(body, "property") {
                        let needed = property_action(interface, property).expect("no action");
                        let properties = "org.freedesktop.DBus.Properties";
                        let result = call(&client, path, properties, "Get", &(interface, property)).await;
                        let refused = result.as_ref().is_err_and(|error| error.contains("AccessDenied"));
                        assert_eq!(!refused, allowed(user, needed), "{user} {interface}.{property}: {result:?}");
                        assert!(refused || result.is_ok(), "{user} {interface}.{property}: {result:?}");
                        let set = (interface, property, zbus::Variant::from("x"));
                        let result = call(&client, path, properties, "Set", &set).await;
                        assert!(result.unwrap_err().contains("PropertyReadOnly"), "{user} {interface}.{property}");
                        checked += 2;
                    }
                    if !members(body, "property").is_empty() {
                        let all = call(&client, path, "org.freedesktop.DBus.Properties", "GetAll", &(interface,)).await;
                        let refused = all.as_ref().is_err_and(|error| error.contains("AccessDenied"));
                        assert_eq!(!refused, allowed(user, action::STATUS), "{user} GetAll {interface}: {all:?}");
                        checked += 1;
                    }
                }
            }
        }
        assert!(checked > 6 * 40, "only {checked} were checked");
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn a_rule_can_tell_profiles_apart() {
    run("matrix::a_rule_can_tell_profiles_apart", || async {
        let world = World::new().await;
        let carol = client("carol").await;
        let connect = async |name: &'static str| manager(&carol, "Connect", &(name, Options::new())).await;
        assert!(connect("forbidden").await.unwrap_err().starts_with("org.proxyvpn1.Error.NotAuthorized"));
        connect("work").await.unwrap();
        assert_eq!(world.take_notes(), ["connect work http://proxy.example:8080 None"]);
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn only_the_daemon_may_own_the_name() {
    run("matrix::only_the_daemon_may_own_the_name", || async {
        let alice = client("alice").await;
        let error = alice.request_name("org.proxyvpn1").await.unwrap_err();
        assert!(
            matches!(&error, zbus::Error::FDO(error) if matches!(**error, zbus::fdo::Error::AccessDenied(_))),
            "{error}"
        );
        client("proxyvpn").await.request_name("org.proxyvpn1").await.unwrap();
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn without_polkit_the_answer_is_no() {
    run("matrix::without_polkit_the_answer_is_no", || async {
        let world = World::new().await;
        let alice = client("alice").await;
        manager(&alice, "Status", &()).await.unwrap();
        // Stopped, and not to be started again.
        std::fs::remove_file("/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service").unwrap();
        let root = client("root").await;
        let bus = zbus::fdo::DBusProxy::new(&root).await.unwrap();
        bus.reload_config().await.unwrap();
        Polkit::find(&root).await.kill();
        while bus.name_has_owner(Polkit::name()).await.unwrap() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        for user in CALLERS {
            let client = client(user).await;
            let error = manager(&client, "Disconnect", &(Options::new(),)).await.unwrap_err();
            assert!(
                error.starts_with("org.proxyvpn1.Error.NotAuthorized: polkit could not be asked"),
                "{user}: {error}"
            );
            let get = (proxyvpn_dbus::names::MANAGER, "State");
            let error = call(&client, MANAGER_PATH, "org.freedesktop.DBus.Properties", "Get", &get).await.unwrap_err();
            assert!(error.contains("AccessDenied") && error.contains("polkit could not be asked"), "{user}: {error}");
        }
        assert!(world.take_notes().is_empty());
    });
}

#[test]
#[ignore = "needs root, dbus-daemon and polkitd"]
fn a_slow_polkit_is_waited_for_but_not_by_who_reads_properties() {
    run("matrix::a_slow_polkit_is_waited_for_but_not_by_who_reads_properties", || async {
        let world = World::new().await;
        let (alice, bob, carol) = (client("alice").await, client("bob").await, client("carol").await);
        manager(&alice, "Status", &()).await.unwrap();
        let polkit = Polkit::find(&alice).await;
        polkit.stop();
        let get = (proxyvpn_dbus::names::MANAGER, "State");
        let property = async {
            let read = call(&carol, MANAGER_PATH, "org.freedesktop.DBus.Properties", "Get", &get).await;
            polkit.go_on();
            read
        };
        let options = (Options::new(),);
        let (done, status, property) =
            tokio::join!(manager(&alice, "Disconnect", &options), manager(&bob, "Status", &()), property);
        let error = property.unwrap_err();
        assert!(error.contains("polkit could not be asked"), "{error}");
        done.unwrap();
        status.unwrap();
        assert_eq!(world.take_notes(), ["disconnect"]);
    });
}
