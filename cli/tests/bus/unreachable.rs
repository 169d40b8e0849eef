//! No bus, no service, no start: each has its own text, and all have exit code 7.

use crate::fake::TestBus;

const VERBS: [&[&str]; 9] = [
    &["connect", "office"],
    &["connect"],
    &["disconnect"],
    &["reconnect"],
    &["status"],
    &["profile", "list"],
    &["plan", "office"],
    &["logs"],
    &["flows"],
];

#[tokio::test]
async fn without_a_bus() {
    let mut bus = TestBus::start();
    bus.address = "unix:path=/nonexistent/bus".to_owned();
    for verb in VERBS {
        let ran = bus.run(verb).await;
        assert_eq!(ran.code, 7, "{verb:?} {ran:?}");
        assert!(ran.err.starts_with("proxyctl: cannot reach the system bus: ") && ran.err.contains("dbus"), "{ran:?}");
    }
}

#[tokio::test]
async fn without_the_service() {
    let bus = TestBus::start();
    for verb in VERBS {
        let ran = bus.run(verb).await;
        assert_eq!(ran.code, 7, "{verb:?} {ran:?}");
        assert!(ran.err.contains("proxyvpnd is not installed") && ran.err.contains("install.sh"), "{ran:?}");
    }
}

#[tokio::test]
async fn when_it_cannot_be_started() {
    let bus = TestBus::start();
    bus.activatable("/bin/false");
    for verb in VERBS {
        let ran = bus.run(verb).await;
        assert_eq!(ran.code, 7, "{verb:?} {ran:?}");
        assert!(ran.err.contains("the daemon could not be started") && ran.err.contains("journalctl"), "{ran:?}");
    }
}
