//! `connect` and `probe` against scripted servers on loopback.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::secret::Secret;

/// The bound in tests that wait for it.
const BOUND: Duration = Duration::from_secs(1);

/// What a server does after it has read the request.
#[derive(Clone)]
enum Step {
    Send(&'static [u8]),
    /// Sends this again and again with so much time in between.
    Drip(&'static [u8], Duration),
    Pause(Duration),
    /// Keeps the connection open and silent.
    Hang,
    /// Closes with RST.
    Reset,
}
use Step::{Drip, Hang, Pause, Reset, Send};

/// Serves one connection; the task gives the request.
async fn serve(steps: Vec<Step>) -> (SocketAddr, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let request = read_request(&mut stream).await;
        for step in steps {
            match step {
                Send(bytes) => stream.write_all(bytes).await.unwrap(),
                Drip(bytes, pause) => {
                    while stream.write_all(bytes).await.is_ok() {
                        tokio::time::sleep(pause).await;
                    }
                }
                Pause(time) => tokio::time::sleep(time).await,
                Hang => while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {},
                Reset => stream.set_zero_linger().unwrap(),
            }
        }
        request
    });
    (address, task)
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0, "{request:?}");
    }
    String::from_utf8(request).unwrap()
}

fn through(addresses: &[SocketAddr], credentials: Option<(&str, &str)>) -> Connector {
    Connector {
        upstream: Upstream::HttpConnect(HttpProxy {
            name: "proxy.example:8080".into(),
            addresses: addresses.to_vec(),
            credentials: credentials
                .map(|(user, password)| Credentials::new(user.into(), Secret::new(password.into())).unwrap()),
            exhausted: Exhausted::default(),
        }),
        mark: None,
        timeout: BOUND,
        refused: Vec::new(),
        only: None,
    }
}

fn name() -> Target {
    Target::Name("web.example".into(), 443)
}

async fn connect_to(steps: Vec<Step>) -> Result<Tunnel, ConnectError> {
    let (address, _server) = serve(steps).await;
    through(&[address], None).connect(&name()).await
}

async fn probe_of(steps: Vec<Step>, credentials: Option<(&str, &str)>) -> Result<(), ConnectError> {
    let (address, _server) = serve(steps).await;
    through(&[address], credentials).probe().await
}

/// An address that nobody listens on.
async fn closed() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A listener whose queue is full, so that SYNs are swallowed. Lives as long as what is returned beside the address.
async fn swallowing() -> (SocketAddr, Vec<socket2::Socket>) {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let client = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let _ = client.connect(&address);
        sockets.push(client);
    }
    (address.as_socket().unwrap(), sockets)
}

#[tokio::test]
async fn the_request_is_what_the_rfc_asks_for() {
    for (target, credentials, want) in [
        (name(), None, "CONNECT web.example:443 HTTP/1.1\r\nHost: web.example:443\r\n\r\n"),
        (
            Target::Address("[2001:db8::1]:80".parse().unwrap()),
            Some(("a", "b")),
            "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\nProxy-Authorization: Basic YTpi\r\n\r\n",
        ),
    ] {
        let (address, server) = serve(vec![Send(b"HTTP/1.1 200 OK\r\n\r\n")]).await;
        through(&[address], credentials).connect(&target).await.unwrap();
        assert_eq!(server.await.unwrap(), want);
    }
}

#[tokio::test]
async fn tunnels() {
    for (steps, early) in [
        (vec![Send(b"HTTP/1.1 200 OK\r\n\r\n")], ""),
        (vec![Send(b"HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n")], ""),
        (vec![Send(b"HTTP/1.1 299 Fine\r\nContent-Length: 1\r\n\r\nearly")], "early"),
        (vec![Send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\nearly")], "early"),
        (
            vec![
                Send(b"HTTP/1.1 100 Contin"),
                Pause(Duration::from_millis(30)),
                Send(b"ue\r\n\r\nHTTP/1.1 200 OK\r\n\r"),
                Pause(Duration::from_millis(30)),
                Send(b"\nearly"),
            ],
            "early",
        ),
    ] {
        let steps = [steps, vec![Pause(Duration::from_millis(30)), Send(b" and late")]].concat();
        let Tunnel { mut stream, early: mut bytes } = connect_to(steps).await.unwrap();
        assert_eq!(bytes, early.as_bytes());
        stream.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, format!("{early} and late").as_bytes(), "no byte lost and none twice");
    }
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connector = through(&[listener.local_addr().unwrap()], None);
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let mut stream = connector.connect(&name()).await.unwrap().stream;
    stream.write_all(b"ping").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).await.unwrap();
    assert_eq!(back, "ping");
    server.await.unwrap();
}

#[tokio::test]
async fn refusals_name_the_proxy_and_the_next_step() {
    for (answer, kind, words) in [
        (
            &b"HTTP/1.1 403 Forbidden\r\n\r\n"[..],
            "refused",
            "refuses web.example:443 (403 Forbidden); ask its operator",
        ),
        (b"HTTP/1.1 405 Not Allowed\r\n\r\n", "refused", "(405 Not Allowed); it does not do CONNECT"),
        (b"HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n", "refused", "(302 Found); it wants a web page to be visited"),
        (b"HTTP/1.1 429 Slow\r\n\r\n", "refused", "(429 Slow); it may be overloaded"),
        (b"HTTP/1.1 501 What\r\n\r\n", "refused", "(501 What); it does not do CONNECT"),
        (
            b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
            "destination",
            "cannot reach web.example:443 (502 Bad Gateway); the destination may",
        ),
        (b"HTTP/1.1 503 \r\n\r\n", "destination", "cannot reach web.example:443 (503); it may be overloaded"),
        (b"HTTP/1.0 504 Gateway Timeout\r\n\r\n", "destination", "(504 Gateway Timeout); the destination may be down"),
    ] {
        let error = connect_to(vec![Send(answer)]).await.unwrap_err();
        let got = match error {
            ConnectError::Refused { .. } => "refused",
            ConnectError::Destination { .. } => "destination",
            _ => "other",
        };
        let text = error.to_string();
        assert_eq!(got, kind, "{text}");
        assert!(text.starts_with("proxy.example:8080 ") && text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn authentication() {
    let plain = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n";
    let other = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: NTLM\r\n\r\n";
    for (answer, credentials, want) in [
        (&plain[..], None, AuthenticationFault::Missing),
        (plain, Some(("a", "wrong")), AuthenticationFault::Rejected),
        (other, Some(("a", "b")), AuthenticationFault::NoBasic),
        (b"HTTP/1.0 401 Unauthorized\r\n\r\n", Some(("a", "wrong")), AuthenticationFault::Rejected),
    ] {
        for probe in [false, true] {
            let (address, _server) = serve(vec![Send(answer)]).await;
            let connector = through(&[address], credentials);
            let error =
                if probe { connector.probe().await.err() } else { connector.connect(&name()).await.err() }.unwrap();
            let ConnectError::Authentication { fault, .. } = error else { panic!("{error}") };
            assert_eq!(fault, want);
            assert!(!error.to_string().contains("wrong"), "{error}");
        }
    }
}

#[tokio::test]
async fn what_is_no_http() {
    const LONG: &[u8] = &[b'x'; 17 * 1024];
    for (steps, words) in [
        (vec![Send(b"SSH-2.0-OpenSSH_9.2\r\n"), Hang], "it sent \"SSH-2.0-OpenSSH_9.2\", which is not HTTP"),
        (vec![Send(b"\x15\x03\x01\x00\x02\x02\x46"), Hang], "in TLS"),
        (vec![], "closed the connection without an answer"),
        (vec![Send(b"HTTP/1.1 200 OK\r\nVia: x"), Pause(Duration::from_millis(20))], "in the middle of its answer"),
        (vec![Send(b"HTTP/1.1 200 OK\r\nVia: "), Send(LONG), Hang], "longer than 16 KiB"),
        (vec![Drip(b"HTTP/1.1 100 Continue\r\n\r\n", Duration::from_millis(1))], "interim answers"),
        (vec![Send(b"HTTP/1.1 2x0 OK\r\n\r\n"), Hang], "is broken"),
        (vec![Reset], "reset the connection"),
    ] {
        for probe in [false, true] {
            let (address, _server) = serve(steps.clone()).await;
            let connector = through(&[address], None);
            let begin = Instant::now();
            let error =
                if probe { connector.probe().await.err() } else { connector.connect(&name()).await.err() }.unwrap();
            assert!(begin.elapsed() < BOUND, "known before the bound: {error}");
            assert!(matches!(error, ConnectError::Protocol { .. }), "{error:?}");
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.is_upstream());
        }
    }
}

#[tokio::test]
async fn the_bound_holds() {
    for steps in [
        vec![Hang],
        vec![Send(b"HTTP/1.1 200 OK\r\n"), Hang],
        vec![Send(b"HTTP/1.1 200 OK\r\n"), Drip(b"A: b\r\n", Duration::from_millis(5))],
    ] {
        let begin = Instant::now();
        let error = connect_to(steps).await.unwrap_err();
        let took = begin.elapsed();
        assert!(matches!(error, ConnectError::Silent { seconds: 1, .. }), "{error:?}");
        assert!(took >= BOUND && took < BOUND * 3, "{took:?}");
    }
}

#[tokio::test]
async fn a_proxy_without_tcp_is_unreachable() {
    let error = through(&[closed().await], None).connect(&name()).await.unwrap_err();
    let ConnectError::Unreachable { ref source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(!error.to_string().contains("refused"), "the cause is in the source only: {error}");

    let (address, _full) = swallowing().await;
    let begin = Instant::now();
    let error = through(&[address], None).probe().await.unwrap_err();
    let ConnectError::Unreachable { ref source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
    assert!(begin.elapsed() < BOUND * 3);

    assert!(matches!(through(&[], None).connect(&name()).await, Err(ConnectError::Unreachable { .. })));
}

#[tokio::test]
async fn the_next_address_is_tried() {
    // The best of five: a busy machine can delay any of them.
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let (good, _server) = serve(vec![Send(b"HTTP/1.1 200 OK\r\n\r\n")]).await;
        let addresses = [closed().await, good];
        let begin = Instant::now();
        let tunnel = through(&addresses, None).connect(&name()).await.unwrap();
        best = best.min(begin.elapsed());
        assert_eq!(tunnel.stream.peer_addr().unwrap(), good);
    }
    assert!(best < Duration::from_millis(200), "a refusal is not waited on: {best:?}");

    let (good, _server) = serve(vec![Send(b"HTTP/1.1 200 OK\r\n\r\n")]).await;
    let (hole, _full) = swallowing().await;
    let begin = Instant::now();
    let mut connector = through(&[hole, good], None);
    connector.timeout = Duration::from_secs(5);
    let tunnel = connector.connect(&name()).await.unwrap();
    assert_eq!(tunnel.stream.peer_addr().unwrap(), good);
    assert!((Duration::from_millis(250)..Duration::from_secs(4)).contains(&begin.elapsed()), "{:?}", begin.elapsed());

    let error = through(&[closed().await, closed().await], None).connect(&name()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn a_bad_name_makes_no_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connector = through(&[listener.local_addr().unwrap()], None);
    let error = connector.connect(&Target::Name("a\r\nX: y".into(), 443)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Name { .. }), "{error:?}");
    assert!(!error.to_string().contains('\n'), "{error}");
    assert!(tokio::time::timeout(Duration::from_millis(50), listener.accept()).await.is_err());
}

#[tokio::test]
async fn a_dropped_attempt_closes_the_socket() {
    let (address, server) = serve(vec![Hang]).await;
    let connector = through(&[address], None);
    assert!(tokio::time::timeout(Duration::from_millis(50), connector.connect(&name())).await.is_err());
    tokio::time::timeout(Duration::from_secs(2), server).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_probe_asks_for_the_proxy_itself() {
    let (address, server) = serve(vec![Send(b"HTTP/1.1 403 Forbidden\r\n\r\n")]).await;
    through(&[closed().await, address], Some(("a", "b"))).probe().await.unwrap();
    assert_eq!(
        server.await.unwrap(),
        "CONNECT 127.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1:443\r\nProxy-Authorization: Basic YTpi\r\n\r\n"
    );
}

#[tokio::test]
async fn the_probe_tells_proxies_from_web_servers() {
    for alive in [
        &b"HTTP/1.1 200 OK\r\n\r\n"[..],
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 403 Filtered\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"HTTP/1.0 500 Unable to connect\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
    ] {
        probe_of(vec![Send(alive)], None).await.unwrap();
        probe_of(vec![Send(alive)], Some(("a", "b"))).await.unwrap();
    }
    for (other, words) in [
        (&b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"[..], "it may be a web server"),
        (b"HTTP/1.1 405 Method Not Allowed\r\n\r\n", "as a web server that is no proxy"),
        (b"HTTP/1.1 501 Not Implemented\r\n\r\n", "as a web server that is no proxy"),
        (b"HTTP/1.1 505 Version\r\n\r\n", "as a web server that is no proxy"),
    ] {
        let error = probe_of(vec![Send(other)], None).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }) && error.to_string().contains(words), "{error}");
    }
    let error = probe_of(vec![Hang], None).await.unwrap_err();
    assert!(matches!(error, ConnectError::Silent { .. }), "{error:?}");
}

#[tokio::test]
async fn what_is_forbidden_is_reached_by_no_way() {
    let direct = Connector {
        upstream: Upstream::Direct,
        mark: None,
        timeout: BOUND,
        refused: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        only: None,
    };
    direct.probe().await.unwrap();
    // A proxy that would say yes; nobody comes.
    let (address, asked) = serve(vec![Send(b"HTTP/1.1 200 OK\r\n\r\n")]).await;
    let proxied = Connector { refused: direct.refused.clone(), ..through(&[address], None) };
    for ip in [
        "127.0.0.1",
        "127.255.255.254",
        "::1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
        "::",
        "::ffff:0.0.0.0",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "192.0.2.7",
        "::ffff:192.0.2.7",
        "2001:db8::7",
    ] {
        let ip: IpAddr = ip.parse().unwrap();
        for connector in [&direct, &proxied] {
            let error = connector.connect(&Target::Address(SocketAddr::new(ip, 80))).await.unwrap_err();
            assert!(matches!(error, ConnectError::Forbidden(_)), "{ip}: {error:?}");
        }
    }
    assert!(!asked.is_finished(), "the proxy was asked");
    assert!(matches!(direct.connect(&name()).await, Err(ConnectError::Name { .. })));
}
