//! CONNECT as bytes (RFC 9110 section 9.3.6, RFC 9112): builds the request, reads the answer. No I/O, no time.

use zeroize::Zeroizing;

use super::{ConnectError, Credentials, Target};

/// Most bytes of all answers' header sections together, interim ones included.
pub(super) const MOST_HEAD: usize = 16 * 1024;
/// Most interim (1xx) answers.
const MOST_INTERIM: usize = 8;
/// Most header fields of one answer.
const MOST_FIELDS: usize = 128;
/// Longest host name, in bytes.
const LONGEST_NAME: usize = 255;
/// Longest piece of foreign text in a message, in characters.
const LONGEST_EXCERPT: usize = 80;

/// What every answer that we understand begins with.
const VERSION: &[u8] = b"HTTP/1.";

/// The final answer to CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// 200 to 599.
    pub(super) status: u16,
    /// Reason phrase, cut and free of control characters; may be empty.
    pub(super) reason: String,
    /// `Proxy-Authenticate` is there and offers no Basic.
    pub(super) other_schemes_only: bool,
    /// What came behind the header. In a 2xx all of it is the tunnel's: Content-Length and Transfer-Encoding mean nothing
    /// there (RFC 9110 section 9.3.6).
    pub(super) early: Vec<u8>,
}

/// Why an answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("it sent {0:?}, which is not HTTP")]
    NotHttp(String),
    #[error("it answered in TLS; an https:// proxy is not supported yet")]
    Tls,
    #[error("the header of its answer is longer than {} KiB", MOST_HEAD / 1024)]
    TooLong,
    #[error("it sent more than {MOST_INTERIM} interim answers")]
    TooManyInterim,
    #[error("the header of its answer is broken")]
    Header,
    #[error("it answered with status {0}, which makes no sense here")]
    Status(u16),
    #[error("it closed the connection without an answer")]
    Closed,
    #[error("it closed the connection in the middle of its answer")]
    Cut,
}

/// `host:port` of `target` as CONNECT wants it; IPv6 in brackets, without a zone.
///
/// # Errors
/// [`ConnectError::Name`] for a name that is empty, too long or has a character that no host name has.
pub(super) fn authority(target: &Target) -> Result<String, ConnectError> {
    match target {
        Target::Address(address) => Ok(std::net::SocketAddr::new(address.ip(), address.port()).to_string()),
        Target::Name(name, port) => match name_problem(name) {
            None => Ok(format!("{name}:{port}")),
            Some(problem) => Err(ConnectError::Name { name: excerpt(name.as_bytes()), problem }),
        },
    }
}

fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("the name is empty");
    }
    if name.len() > LONGEST_NAME {
        return Some("the name is longer than 255 bytes");
    }
    // Names come from DNS packets, so from anybody: no byte may end the line or the authority.
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (!name.bytes().all(fits)).then_some("only letters, digits, '-', '_' and '.' can stand in a host name")
}

/// The request. `Host` is the target, as RFC 9112 section 3.2 says; nothing else that could tell clients apart.
pub(super) fn request(authority: &str, credentials: Option<&Credentials>) -> Zeroizing<Vec<u8>> {
    let basic = credentials.map(Credentials::basic);
    let parts = [
        "CONNECT ",
        authority,
        " HTTP/1.1\r\nHost: ",
        authority,
        "\r\n",
        basic.as_ref().map_or("", |_| "Proxy-Authorization: Basic "),
        basic.as_ref().map_or("", |basic| basic.as_str()),
        basic.as_ref().map_or("", |_| "\r\n"),
        "\r\n",
    ];
    // Room for all at once: a buffer that grows leaves a copy of the password behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(parts.iter().map(|part| part.len()).sum()));
    for part in parts {
        bytes.extend_from_slice(part.as_bytes());
    }
    bytes
}

/// Reads answers from bytes as they come, however they are split.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// All that came.
    buffer: Vec<u8>,
    /// Where the present answer begins.
    start: usize,
    /// Where the first line that was not looked at begins.
    line: usize,
    /// How far line ends were looked for.
    scanned: usize,
    /// Interim answers so far.
    interim: usize,
}

impl Decoder {
    /// Takes the next bytes; gives the final answer once it is whole. Not to be called again after that.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Option<Answer>, Malformed> {
        self.buffer.extend_from_slice(bytes);
        loop {
            let limit = self.buffer.len().min(MOST_HEAD);
            check_version(&self.buffer[self.start..limit])?;
            let Some(end) = self.head_end() else {
                return if limit == MOST_HEAD { Err(Malformed::TooLong) } else { Ok(None) };
            };
            let answer = parse(&self.buffer[self.start..end])?;
            match answer.status {
                // Nobody asked for another protocol.
                100 | 102..=199 => {
                    self.interim += 1;
                    if self.interim > MOST_INTERIM {
                        return Err(Malformed::TooManyInterim);
                    }
                    self.start = end;
                }
                200..=599 => return Ok(Some(Answer { early: self.buffer.split_off(end), ..answer })),
                status => return Err(Malformed::Status(status)),
            }
        }
    }

    /// The error for a connection that ended before the answer was whole.
    pub(super) fn end(&self) -> Malformed {
        if self.buffer.is_empty() { Malformed::Closed } else { Malformed::Cut }
    }

    /// Where the header section ends that begins at `start`: behind the first empty line, within the bound. Every byte is
    /// looked at once, so that a peer that sends single bytes costs no more than one that sends all at once.
    fn head_end(&mut self) -> Option<usize> {
        let limit = self.buffer.len().min(MOST_HEAD);
        while let Some(length) = self.buffer[self.scanned..limit].iter().position(|byte| *byte == b'\n') {
            let line = &self.buffer[self.line..self.scanned + length];
            self.scanned += length + 1;
            self.line = self.scanned;
            if matches!(line, b"" | b"\r") {
                return Some(self.scanned);
            }
        }
        self.scanned = limit;
        None
    }
}

/// Tells by the first bytes what is not HTTP, so that nobody waits for the end of a header that never comes.
fn check_version(bytes: &[u8]) -> Result<(), Malformed> {
    let seen = bytes.len().min(VERSION.len());
    if bytes[..seen] == VERSION[..seen] {
        return Ok(());
    }
    // RFC 8446 section 5.1: alert or handshake record.
    Err(if matches!(bytes, [0x15 | 0x16, ..]) { Malformed::Tls } else { Malformed::NotHttp(excerpt(bytes)) })
}

/// Reads one whole header section.
fn parse(head: &[u8]) -> Result<Answer, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        _ => return Err(Malformed::Header),
    }
    let mut schemes = response
        .headers
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case("proxy-authenticate"))
        .flat_map(|field| field.value.split(|byte| *byte == b','))
        .map(|challenge| challenge.trim_ascii().split(|byte| *byte == b' ').next().unwrap_or_default())
        .peekable();
    Ok(Answer {
        status: response.code.ok_or(Malformed::Header)?,
        reason: excerpt(response.reason.unwrap_or_default().as_bytes()),
        other_schemes_only: schemes.peek().is_some() && !schemes.any(|scheme| scheme.eq_ignore_ascii_case(b"basic")),
        early: Vec::new(),
    })
}

/// The beginning of foreign text, safe to print: one line, at most 80 characters, no control characters.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    let line = bytes.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
    // Four bytes are the longest character.
    let line = &line[..line.len().min(4 * LONGEST_EXCERPT)];
    String::from_utf8_lossy(line).chars().filter(|char| !char.is_control()).take(LONGEST_EXCERPT).collect()
}

#[cfg(test)]
mod tests;
