#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;
use crate::secret::Secret;

/// Feeds `pieces`, then the end of the stream; gives the result and how many bytes were taken.
fn decode(pieces: &[&[u8]]) -> (Result<Answer, Malformed>, usize) {
    let mut decoder = Decoder::default();
    let mut taken = 0;
    for piece in pieces {
        taken += piece.len();
        match decoder.feed(piece) {
            Ok(Some(answer)) => return (Ok(answer), taken),
            Ok(None) => {}
            Err(error) => return (Err(error), taken),
        }
    }
    (Err(decoder.end()), taken)
}

fn whole(bytes: &[u8]) -> Result<Answer, Malformed> {
    decode(&[bytes]).0
}

fn final_answer(status: u16, reason: &str, early: &[u8]) -> Answer {
    Answer { status, reason: reason.into(), other_schemes_only: false, early: early.into() }
}

#[test]
fn final_answers() {
    for (bytes, want) in [
        ("HTTP/1.1 200 OK\r\n\r\n", final_answer(200, "OK", b"")),
        ("HTTP/1.0 200 Connection established\r\n\r\n", final_answer(200, "Connection established", b"")),
        ("HTTP/1.1 200\r\n\r\n", final_answer(200, "", b"")),
        ("HTTP/1.1 204 No\n\n", final_answer(204, "No", b"")),
        ("HTTP/1.1 200 OK\r\n\r\nSSH-2.0-x\r\n", final_answer(200, "OK", b"SSH-2.0-x\r\n")),
        // The length of a 2xx to CONNECT is to be ignored: these two bytes and all others are the tunnel's.
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabcd", final_answer(200, "OK", b"abcd")),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", final_answer(200, "OK", b"0\r\n\r\n")),
        // What follows may look like another answer.
        ("HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 403 No\r\n\r\n", final_answer(200, "OK", b"HTTP/1.1 403 No\r\n\r\n")),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n!",
            final_answer(200, "OK", b"!"),
        ),
    ] {
        assert_eq!(whole(bytes.as_bytes()), Ok(want), "{bytes:?}");
    }
}

#[test]
fn broken_answers() {
    for (bytes, want) in [
        ("", Malformed::Closed),
        ("HTTP/1.1 200 OK\r\nA: b", Malformed::Cut),
        ("HT", Malformed::Cut),
        ("SSH-2.0-OpenSSH_9.2p1 Debian\r\n", Malformed::NotHttp("SSH-2.0-OpenSSH_9.2p1 Debian".into())),
        ("HTTP/2 200 OK\r\n\r\n", Malformed::NotHttp("HTTP/2 200 OK".into())),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n", Malformed::NotHttp(String::new())),
        ("\u{15}\u{3}\u{1}\0\u{2}\u{2}\u{46}", Malformed::Tls),
        ("HTTP/1.2 200 OK\r\n\r\n", Malformed::Header),
        ("HTTP/1.1 2000 OK\r\n\r\n", Malformed::Header),
        ("HTTP/1.1 20x OK\r\n\r\n", Malformed::Header),
        ("HTTP/1.1 200 OK\r\nno colon\r\n\r\n", Malformed::Header),
        ("HTTP/1.1 099 Hm\r\n\r\n", Malformed::Status(99)),
        ("HTTP/1.1 600 Hm\r\n\r\n", Malformed::Status(600)),
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", Malformed::Status(101)),
    ] {
        assert_eq!(whole(bytes.as_bytes()), Err(want), "{bytes:?}");
    }
}

#[test]
fn the_header_is_bounded() {
    let sized = |size: usize| {
        let (begin, end) = ("HTTP/1.1 200 OK\r\nA: ", "\r\n\r\n");
        format!("{begin}{}{end}", "x".repeat(size - begin.len() - end.len()))
    };
    assert_eq!(whole(sized(MOST_HEAD).as_bytes()), Ok(final_answer(200, "OK", b"")));
    assert_eq!(whole(sized(MOST_HEAD + 1).as_bytes()), Err(Malformed::TooLong));
    let interim = "HTTP/1.1 100 Continue\r\n\r\n";
    assert_eq!(whole((interim.to_owned() + &sized(MOST_HEAD)).as_bytes()), Err(Malformed::TooLong), "all together");
    let many = |count: usize| interim.repeat(count) + "HTTP/1.1 200 OK\r\n\r\n";
    assert!(whole(many(MOST_INTERIM).as_bytes()).is_ok());
    assert_eq!(whole(many(MOST_INTERIM + 1).as_bytes()), Err(Malformed::TooManyInterim));
    let fields = "A: b\r\n".repeat(MOST_FIELDS + 1);
    assert_eq!(whole(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes()), Err(Malformed::Header));
}

#[test]
fn a_header_that_never_ends_is_given_up_at_the_bound() {
    let (result, taken) = decode(&vec![b"HTTP/1.1 200 OK\r\nA: b\r\n".as_slice(); 100_000]);
    assert_eq!(result, Err(Malformed::TooLong));
    assert!(taken < MOST_HEAD + 32, "{taken}");
}

#[test]
fn reason_phrases_are_cut() {
    let long = whole(format!("HTTP/1.1 403 {}\r\n\r\n", "no ".repeat(1000)).as_bytes()).unwrap();
    assert_eq!(long.reason.chars().count(), LONGEST_EXCERPT);
    assert_eq!(excerpt(b"a\x1b[31mb\0\x7f c\r\nd"), "a[31mb c");
    assert_eq!(excerpt("é".repeat(500).as_bytes()), "é".repeat(LONGEST_EXCERPT));
}

#[test]
fn authentication_schemes() {
    for (fields, other_schemes_only) in [
        ("", false),
        ("Proxy-Authenticate: Basic realm=\"x\"\r\n", false),
        ("Proxy-Authenticate: Negotiate\r\nproxy-authenticate: BASIC realm=x\r\n", false),
        ("Proxy-Authenticate: Digest realm=\"x\", qop=\"auth\", basic realm=\"y\"\r\n", false),
        ("Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n", true),
        ("Proxy-Authenticate: Basically realm=x\r\n", true),
        ("WWW-Authenticate: NTLM\r\n", false),
    ] {
        let answer = whole(format!("HTTP/1.1 407 Log in\r\n{fields}\r\n").as_bytes()).unwrap();
        assert_eq!(answer.other_schemes_only, other_schemes_only, "{fields:?}");
    }
}

#[test]
fn requests() {
    let plain = request("a.example:80", None);
    assert_eq!(std::str::from_utf8(&plain).unwrap(), "CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n");
    let credentials = Credentials::new("Aladdin".into(), Secret::new("open sesame".into())).unwrap();
    let with = request("[2001:db8::1]:443", Some(&credentials));
    assert_eq!(
        std::str::from_utf8(&with).unwrap(),
        "CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\
         Proxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n"
    );
    assert_eq!(with.len(), with.capacity(), "one allocation, so no copy of the password is left behind");
}

#[test]
fn authorities() {
    let address = |text: &str| authority(&Target::Address(text.parse::<SocketAddr>().unwrap())).unwrap();
    assert_eq!(address("192.0.2.1:80"), "192.0.2.1:80");
    assert_eq!(address("[2001:db8::1]:443"), "[2001:db8::1]:443");
    assert_eq!(address("[fe80::1%3]:443"), "[fe80::1]:443", "a zone means nothing elsewhere (RFC 6874)");
    let name = |text: &str| authority(&Target::Name(text.into(), 443));
    for good in ["example.com", "xn--bcher-kva.example", "_srv.example.com.", "127.0.0.1", &"x".repeat(255)] {
        assert_eq!(name(good).unwrap(), format!("{good}:443"));
    }
    let long = "x".repeat(256);
    for bad in
        ["", &long, "a b", "a\r\nX: y", "a\nb", "a\0b", "a:1", "a/b", "a@b", "[::1]", "bücher.example", "a\u{7f}"]
    {
        assert!(matches!(name(bad), Err(ConnectError::Name { .. })), "{bad:?}");
    }
}

/// Splits `bytes` at `cuts` (taken modulo the length).
fn split<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.sort_unstable();
    let mut begin = 0;
    let mut pieces = Vec::new();
    for cut in cuts.into_iter().chain([bytes.len()]) {
        pieces.push(&bytes[begin..cut]);
        begin = cut;
    }
    pieces
}

/// Bytes that are often almost an answer.
fn answers() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        8 => prop::sample::select(vec![
            "HTTP/1.1 200 OK\r\n", "HTTP/1.0 403 No\r\n", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 407 Auth\r\n", "HTTP/1.", "A: b\r\n",
            "Proxy-Authenticate: Basic\r\n", "\r\n", "\n", "\r", " ", "\r\n\r\n", "x", ":", "HTTP/1.1 999\r\n",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        2 => prop::collection::vec(any::<u8>(), 0..20),
        1 => (0..3 * MOST_HEAD).prop_map(|length| vec![b'y'; length]),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn the_result_does_not_depend_on_the_pieces(bytes in answers(), cuts in prop::collection::vec(any::<usize>(), 0..40)) {
        let once = whole(&bytes);
        let (parts, taken) = decode(&split(&bytes, &cuts));
        match (once, parts) {
            (Ok(once), Ok(parts)) => {
                prop_assert_eq!(once.status, parts.status);
                prop_assert_eq!(&once.reason, &parts.reason);
                // Nothing is lost and nothing is made up: the early bytes are the end of what was taken.
                prop_assert!(bytes[..taken].ends_with(&parts.early));
                prop_assert!(bytes.ends_with(&once.early));
                prop_assert_eq!(bytes.len() - once.early.len(), taken - parts.early.len());
            }
            // The excerpt shows as much as had come.
            (Err(Malformed::NotHttp(_)), Err(Malformed::NotHttp(_))) => {}
            (once, parts) => prop_assert_eq!(once, parts),
        }
    }

    #[test]
    fn bytes_one_by_one(bytes in answers()) {
        let singles: Vec<&[u8]> = bytes.chunks(1).collect();
        let (parts, taken) = decode(&singles);
        match (whole(&bytes), parts) {
            (Ok(once), Ok(parts)) => {
                prop_assert_eq!(once.status, parts.status);
                prop_assert!(parts.early.is_empty(), "no byte beyond the header was taken");
                prop_assert_eq!(bytes.len() - once.early.len(), taken);
            }
            (Err(Malformed::NotHttp(_)), Err(Malformed::NotHttp(_))) => {}
            (once, parts) => prop_assert_eq!(once, parts),
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000), cuts in prop::collection::vec(any::<usize>(), 0..20)) {
        let _ = decode(&split(&bytes, &cuts));
    }

    #[test]
    fn no_name_can_add_a_line(name in "[a-z.]{1,9}[\\x00-\\x7f]{0,2}[a-z]{0,5}|\\PC{0,9}", port: u16) {
        if let Ok(authority) = authority(&Target::Name(name, port)) {
            let request = request(&authority, None);
            let lines: Vec<&[u8]> = request.split(|byte| *byte == b'\n').collect();
            prop_assert_eq!(lines.len(), 4);
            prop_assert_eq!(lines[0].iter().filter(|byte| **byte == b' ').count(), 2);
        }
    }
}
