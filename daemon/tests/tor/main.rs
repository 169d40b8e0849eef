//! The control port of a real Tor, which has no network: it is in a network namespace with nothing but the loopback.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test tor -- --ignored`, in a namespace of its own
//! as scripts/test-privileged.sh makes it.
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proxyvpnd::tor::hint::{Way, hint};
use proxyvpnd::tor::{Control, Error, Event, NewIdentity, Password};
use tokio::time::{sleep, timeout};

const CONTROL: &str = "127.0.0.1:9051";

/// A Tor with the hash of this password, ended with the value.
struct Tor {
    child: Child,
    directory: PathBuf,
}

impl Tor {
    fn start(password: &Password, more: &str) -> Self {
        let opted_in = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|value| value == "1");
        assert!(opted_in, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs a network namespace of its own");
        let directory = std::env::temp_dir().join(format!("proxyvpn-tor-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let torrc = format!(
            "DataDirectory {}\nSocksPort 127.0.0.1:9050\nControlPort {CONTROL}\nHashedControlPassword {}\nLog notice stdout\n{more}\n",
            directory.display(),
            password.hashed().unwrap().as_ref(),
        );
        let path = directory.join("torrc");
        std::fs::write(&path, torrc).unwrap();
        let mut command = Command::new("tor");
        command.args(["--defaults-torrc", "/dev/null", "-f"]).arg(path).stdout(Stdio::null());
        Self { child: command.spawn().expect("tor is installed"), directory }
    }
}

impl Drop for Tor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

async fn connect(password: &Password) -> Result<Control, Error> {
    let start = Instant::now();
    loop {
        match Control::connect(CONTROL.parse::<SocketAddr>().unwrap(), password).await {
            Err(Error::Connect { .. }) if start.elapsed() < Duration::from_secs(20) => {
                sleep(Duration::from_millis(50)).await
            }
            other => return other,
        }
    }
}

#[tokio::test]
#[ignore = "needs root and makes network namespaces"]
async fn only_the_password_of_the_run_opens_it() {
    let password = Password::generate().unwrap();
    let tor = Tor::start(&password, "DisableNetwork 1");
    let mut control = connect(&password).await.unwrap();
    let other = connect(&Password::generate().unwrap()).await;
    assert!(matches!(other, Err(Error::Password)), "{other:?}");

    let bootstrap = control.bootstrap().await.unwrap();
    assert_eq!((bootstrap.percent, &*bootstrap.tag), (0, "starting"));
    assert!(!control.circuit_established().await.unwrap());
    assert_eq!(control.circuits().await.unwrap(), []);

    assert_eq!(control.new_identity().await.unwrap(), NewIdentity::Now);
    assert_eq!(control.next().await, Event::NewIdentity);
    let NewIdentity::Within(wait) = control.new_identity().await.unwrap() else { panic!("Tor does it every 10 s") };
    assert_eq!(timeout(wait + Duration::from_secs(3), control.next()).await.unwrap(), Event::NewIdentity);

    drop(tor);
    assert!(matches!(control.next().await, Event::Closed(_)));
}

#[tokio::test]
#[ignore = "needs root and makes network namespaces"]
async fn a_start_that_stalls_is_told_with_what_helps() {
    let password = Password::generate().unwrap();
    let _tor = Tor::start(&password, "UseBridges 1\nBridge 127.0.0.1:4");
    let mut control = connect(&password).await.unwrap();
    let stalled = timeout(Duration::from_secs(60), async {
        loop {
            match control.next().await {
                Event::Bootstrap(bootstrap) if !bootstrap.reason.is_empty() => return bootstrap,
                Event::Closed(cause) => panic!("{cause}"),
                _ => {}
            }
        }
    });
    let bootstrap = stalled.await.expect("nobody listens there, and Tor says so");
    assert_eq!((&*bootstrap.tag, &*bootstrap.reason), ("conn", "CONNECTREFUSED"), "{bootstrap:?}");
    assert_eq!((&*bootstrap.warning, &*bootstrap.host), ("Connection refused", "127.0.0.1:4"));
    assert!(hint(&bootstrap, None, Way { bridges: true, ..Way::default() }).contains("get new lines"));
    assert_eq!(control.bootstrap().await.unwrap().percent, bootstrap.percent);
}
