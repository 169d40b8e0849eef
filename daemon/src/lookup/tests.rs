#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use hickory_resolver::proto::op::{Message, MessageType, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA};
use hickory_resolver::proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

use super::*;

/// What the test's DNS server does with a question.
enum Answer {
    Addresses(Vec<IpAddr>),
    Code(ResponseCode),
    Silence,
    /// The UDP answer is cut; the whole one is to be had over TCP.
    Truncated(Vec<IpAddr>),
}

type Zone = fn(&str, RecordType) -> Answer;

/// A DNS server on a port of its own, over UDP and TCP; remembers the questions.
struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    over_tcp: Arc<AtomicUsize>,
}

impl Server {
    async fn start(zone: Zone) -> Self {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        let server = Self { address, asked: Arc::default(), over_tcp: Arc::default() };
        let (asked, over_tcp) = (Arc::clone(&server.asked), Arc::clone(&server.over_tcp));
        let seen = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
                if let Some(reply) = reply(&buffer[..length], zone, &seen, false) {
                    udp.send_to(&reply, from).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                over_tcp.fetch_add(1, Ordering::Relaxed);
                let length = stream.read_u16().await.unwrap();
                let mut query = vec![0; usize::from(length)];
                stream.read_exact(&mut query).await.unwrap();
                if let Some(reply) = reply(&query, zone, &asked, true) {
                    stream.write_u16(u16::try_from(reply.len()).unwrap()).await.unwrap();
                    stream.write_all(&reply).await.unwrap();
                }
            }
        });
        server
    }

    fn asked(&self) -> Vec<String> {
        let mut asked = self.asked.lock().unwrap().clone();
        asked.sort();
        asked
    }
}

fn reply(query: &[u8], zone: Zone, asked: &Mutex<Vec<String>>, tcp: bool) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).unwrap();
    let question = query.queries[0].clone();
    let (name, kind) = (question.name().to_string().to_ascii_lowercase(), question.query_type());
    asked.lock().unwrap().push(format!("{name} {kind}"));
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.recursion_available = true;
    reply.add_query(question.clone());
    let addresses = match zone(&name, kind) {
        Answer::Addresses(addresses) => addresses,
        Answer::Code(code) => {
            reply.metadata.response_code = code;
            Vec::new()
        }
        Answer::Silence => return None,
        Answer::Truncated(_) if !tcp => {
            reply.metadata.truncation = true;
            Vec::new()
        }
        Answer::Truncated(addresses) => addresses,
    };
    for address in addresses {
        let data = match address {
            IpAddr::V4(a) if kind == RecordType::A => RData::A(A(a)),
            IpAddr::V6(a) if kind == RecordType::AAAA => RData::AAAA(AAAA(a)),
            _ => continue,
        };
        reply.add_answer(Record::from_rdata(question.name().clone(), 60, data));
    }
    Some(reply.to_vec().unwrap())
}

fn ips(list: &str) -> Vec<IpAddr> {
    list.split_whitespace().map(|address| address.parse().unwrap()).collect()
}

fn conf(search: &str, ndots: usize) -> ResolvConf {
    ResolvConf { servers: Vec::new(), search: search.split_whitespace().map(str::to_owned).collect(), ndots }
}

async fn ask(server: &Server, host: &str, conf: &ResolvConf) -> Result<Vec<IpAddr>, LookupError> {
    let resolvers = [server.address.ip()];
    let timeout = Duration::from_secs(2);
    let lookup = Lookup { resolvers: &resolvers, port: server.address.port(), mark: None, timeout, hosts: "", conf };
    lookup.run(host).await
}

fn zone(name: &str, kind: RecordType) -> Answer {
    match (name, kind) {
        ("proxy.example.", _) => Answer::Addresses(ips("2001:db8::1 192.0.2.1 192.0.2.2")),
        ("four.example.", RecordType::A) => Answer::Addresses(ips("192.0.2.4")),
        ("four.example.", _) => Answer::Silence,
        ("big.example.", _) => Answer::Truncated(ips("192.0.2.9")),
        ("empty.example.", _) => Answer::Addresses(Vec::new()),
        ("broken.example.", _) => Answer::Code(ResponseCode::ServFail),
        ("closed.example.", _) => Answer::Code(ResponseCode::Refused),
        ("silent.example.", _) => Answer::Silence,
        // The two families of one short name, under two domains.
        ("short.one.", RecordType::A) => Answer::Addresses(ips("192.0.2.11")),
        ("short.one.", _) => Answer::Addresses(Vec::new()),
        ("short.two.", _) => Answer::Addresses(ips("2001:db8::22 192.0.2.22")),
        _ => Answer::Code(ResponseCode::NXDomain),
    }
}

#[tokio::test]
async fn a_name_is_asked_for_both_families() {
    let server = Server::start(zone).await;
    let got = ask(&server, "proxy.example", &conf("", 1)).await.unwrap();
    assert_eq!(got, ips("192.0.2.1 192.0.2.2 2001:db8::1"));
    assert_eq!(server.asked(), ["proxy.example. A", "proxy.example. AAAA"]);
}

#[tokio::test]
async fn a_server_that_never_answers_aaaa_costs_little() {
    let server = Server::start(zone).await;
    let begin = Instant::now();
    assert_eq!(ask(&server, "four.example", &conf("", 1)).await.unwrap(), ips("192.0.2.4"));
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_cut_answer_is_fetched_over_tcp() {
    let server = Server::start(zone).await;
    assert_eq!(ask(&server, "big.example", &conf("", 1)).await.unwrap(), ips("192.0.2.9"));
    assert!(server.over_tcp.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn families_of_two_names_are_never_mixed() {
    let server = Server::start(zone).await;
    assert_eq!(ask(&server, "short", &conf("one two", 1)).await.unwrap(), ips("192.0.2.11"));
    assert_eq!(ask(&server, "short", &conf("none two", 1)).await.unwrap(), ips("192.0.2.22 2001:db8::22"));
}

#[tokio::test]
async fn errors_are_in_the_users_words() {
    let server = Server::start(zone).await;
    for (host, says) in [
        ("typo.example", "there is no host typo.example (asked 127.0.0.1)"),
        ("empty.example", "empty.example has no address"),
        ("broken.example", "answered Server Failure"),
        ("closed.example", "answered Query Refused"),
        ("silent.example", "no answer from the DNS server (127.0.0.1) within 2 s"),
    ] {
        let begin = Instant::now();
        let error = ask(&server, host, &conf("", 1)).await.unwrap_err().to_string();
        assert!(error.contains(says), "{host}: {error}");
        assert!(begin.elapsed() < Duration::from_millis(2_500), "{host}: {:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn nobody_to_ask_and_nothing_to_ask_for() {
    let timeout = Duration::from_secs(1);
    let error = resolve("proxy.invalid", &[], None, timeout).await.unwrap_err();
    assert!(matches!(error, LookupError::NoResolver { .. }), "{error}");
    let error = resolve("a b", &[], None, timeout).await.unwrap_err();
    assert!(matches!(error, LookupError::BadName(_)), "{error}");
    for literal in ["192.0.2.7", "2001:db8::7"] {
        assert_eq!(resolve(literal, &[], None, timeout).await.unwrap(), ips(literal));
    }
    assert!(resolve("localhost", &[], None, timeout).await.unwrap().iter().all(IpAddr::is_loopback));
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_named() {
    // Nothing listens there, which an unconnected UDP socket does not get to know.
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (resolvers, conf) = ([free.ip()], conf("", 1));
    let timeout = Duration::from_secs(1);
    let lookup = Lookup { resolvers: &resolvers, port: free.port(), mark: None, timeout, hosts: "", conf: &conf };
    let error = lookup.run("proxy.example").await.unwrap_err().to_string();
    assert!(error.contains("the DNS server (127.0.0.1)") || error.contains("no answer"), "{error}");
}

#[test]
fn hosts_come_first() {
    let hosts = "# no\n192.0.2.5 Proxy.Example proxy # 192.0.2.6 proxy\n2001:db8::5\tproxy.example.\nnonsense proxy\n\n192.0.2.8\n";
    assert_eq!(local("proxy.example", hosts), ips("192.0.2.5 2001:db8::5"));
    assert_eq!(local("proxy", hosts), ips("192.0.2.5"));
    assert_eq!(local("proxy.example.", hosts), ips("192.0.2.5 2001:db8::5"));
    assert!(local("example", hosts).is_empty());
    assert_eq!(local("localhost", ""), ips("127.0.0.1 ::1"));
    assert_eq!(local("localhost", "192.0.2.1 localhost"), ips("192.0.2.1"));
}

#[test]
fn the_search_list_is_gone_through_as_resolv_conf_says() {
    for (host, search, ndots, want) in [
        ("proxy", "", 1, "proxy."),
        ("proxy", "a b.c", 1, "proxy.a. proxy.b.c. proxy."),
        ("proxy.x", "a", 1, "proxy.x. proxy.x.a."),
        ("proxy.x", "a", 2, "proxy.x.a. proxy.x."),
        ("proxy.", "a", 1, "proxy."),
    ] {
        assert_eq!(candidates(host, &conf(search, ndots)).join(" "), want, "{host}");
    }
}
