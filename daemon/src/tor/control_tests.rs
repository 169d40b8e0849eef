#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;

use super::*;

/// A Tor that answers each command as `answer` says, and then with nothing more.
async fn tor(answer: impl Fn(&str) -> String + Send + 'static) -> (SocketAddr, Password) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line).await.unwrap() > 0 {
            let answer = answer(line.trim_end());
            stream.write_all(answer.as_bytes()).await.unwrap();
            if answer.ends_with("bye\r\n") {
                return;
            }
            line.clear();
        }
    });
    (address, Password::generate().unwrap())
}

/// One that is well.
fn well(command: &str) -> String {
    let answer = match command.split(' ').nth(1).unwrap_or_default() {
        "status/bootstrap-phase" => {
            "250-status/bootstrap-phase=NOTICE BOOTSTRAP PROGRESS=45 TAG=requesting_descriptors SUMMARY=\"Asking\"\r\n"
        }
        "status/circuit-established" => "250-status/circuit-established=1\r\n",
        "circuit-status" => {
            "250+circuit-status=\r\n1 BUILT $AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA~one,$BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB~two PURPOSE=GENERAL\r\n.\r\n"
        }
        "ns/id/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" => {
            "250+ns/id/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\nr one a b 2026-01-31 12:00:00 192.0.2.7 9001 0\r\ns Fast\r\n.\r\n"
        }
        "ip-to-country/192.0.2.7" => "250-ip-to-country/192.0.2.7=de\r\n",
        key if key.starts_with("ns/id/") => return "552 Unrecognized key\r\n".to_owned(),
        _ => "",
    };
    format!("{answer}250 OK\r\n")
}

#[tokio::test]
async fn it_authenticates_and_asks() {
    let (address, password) = tor(well).await;
    let mut control = Control::connect(address, &password).await.unwrap();
    assert_eq!(control.bootstrap().await.unwrap().percent, 45);
    assert!(control.circuit_established().await.unwrap());
    let circuits = control.circuits().await.unwrap();
    let relays: Vec<_> =
        circuits[0].path.iter().map(|relay| (&*relay.nickname, relay.address, relay.country.as_deref())).collect();
    assert_eq!(relays, [("one", Some([192, 0, 2, 7].into()), Some("de")), ("two", None, None)]);
}

#[tokio::test]
async fn refusals_are_told_apart() {
    let (address, password) = tor(|_| "515 Authentication failed\r\n".to_owned()).await;
    assert!(matches!(Control::connect(address, &password).await, Err(Error::Password)));
    let refuses = |command: &str| {
        if command.starts_with("AUTH") { "250 OK\r\n" } else { "552 Unrecognized \u{1b}event\r\n" }.to_owned()
    };
    let (address, password) = tor(refuses).await;
    let error = Control::connect(address, &password).await.unwrap_err();
    assert_eq!(error.to_string(), "Tor refuses SETEVENTS: 552 Unrecognized  event");
    let (address, password) = tor(|_| "bye\r\n".to_owned()).await;
    assert!(matches!(Control::connect(address, &password).await, Err(Error::Malformed)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert!(matches!(Control::connect(address, &password).await, Err(Error::Connect { .. })));
}

#[tokio::test(start_paused = true)]
async fn one_that_says_nothing_is_not_waited_for() {
    let (address, password) = tor(|_| String::new()).await;
    assert!(matches!(Control::connect(address, &password).await, Err(Error::Silent)));
}

#[tokio::test]
async fn events_come_between_answers_and_after_them() {
    let (address, password) = tor(|command| match command {
        "GETINFO status/bootstrap-phase" => {
            format!("650 STATUS_CLIENT NOTICE CIRCUIT_ESTABLISHED\r\n{}650 SIGNAL NEWNYM\r\nbye\r\n", well(command))
        }
        other => well(other),
    })
    .await;
    let mut control = Control::connect(address, &password).await.unwrap();
    assert_eq!(control.bootstrap().await.unwrap().percent, 45);
    assert_eq!(control.next().await, Event::CircuitEstablished);
    assert_eq!(control.next().await, Event::NewIdentity);
    assert!(matches!(control.next().await, Event::Closed(_)));
    assert!(timeout(Duration::from_millis(50), control.next()).await.is_err(), "the end is told once");
}

#[tokio::test]
async fn a_flood_of_events_does_not_grow() {
    let flood = "650 STATUS_CLIENT NOTICE CIRCUIT_ESTABLISHED\r\n".repeat(10_000);
    let (address, password) =
        tor(move |command| if command.starts_with("SETEV") { flood.clone() + "250 OK\r\n" } else { well(command) })
            .await;
    let control = Control::connect(address, &password).await.unwrap();
    assert_eq!(control.events.len(), MAX_EVENTS);
}

#[tokio::test]
async fn the_answer_to_a_dropped_call_is_not_taken_for_another() {
    let (address, password) = tor(well).await;
    let mut control = Control::connect(address, &password).await.unwrap();
    for _ in 0..3 {
        tokio::select! { biased; _ = control.circuit_established() => {}, () = tokio::task::yield_now() => {} }
    }
    assert_eq!(control.bootstrap().await.unwrap().percent, 45);
    assert_eq!(control.answered, control.sent);
}

#[tokio::test]
async fn a_new_identity_comes_at_once_or_when_tor_has_waited() {
    let renewals = std::sync::atomic::AtomicU32::new(0);
    let (address, password) = tor(move |command| {
        let first = command == "SIGNAL NEWNYM" && renewals.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        well(command) + if first { "650 SIGNAL NEWNYM\r\n" } else { "" }
    })
    .await;
    let mut control = Control::connect(address, &password).await.unwrap();
    assert_eq!(control.new_identity().await.unwrap(), NewIdentity::Now);
    assert_eq!(control.next().await, Event::NewIdentity);
    let NewIdentity::Within(wait) = control.new_identity().await.unwrap() else { panic!("Tor has not said so") };
    assert!(wait > Duration::from_secs(8) && wait < NEWNYM_INTERVAL, "{wait:?}");
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_ends_it() {
    let (address, password) =
        tor(|command| if command.starts_with("SETEV") { "250 OK\r\n250 OK\r\n".to_owned() } else { well(command) })
            .await;
    let mut control = Control::connect(address, &password).await.unwrap();
    assert!(matches!(control.next().await, Event::Closed(_)));
}
