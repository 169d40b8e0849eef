//! The upstream's URL: `http://[user@]host:port` or `direct://` (RFC 3986). No message repeats the part before the `@`:
//! somebody may have written a password there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::check;
use super::error::Rejected;
use super::profile::Scheme;

/// A URL after all checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamUrl {
    /// Protocol.
    pub scheme: Scheme,
    /// Host name or address literal without brackets; empty for [`Scheme::Direct`].
    pub host: String,
    /// TCP port; 0 for [`Scheme::Direct`].
    pub port: u16,
    /// User name, percent-decoded.
    pub username: Option<String>,
}

/// Reads a URL.
///
/// # Errors
/// What is wrong and what to write instead.
pub fn parse(url: &str) -> Result<UpstreamUrl, Rejected> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(Rejected::new("the URL has no scheme; write it as http://host:port"));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "http" => http(rest),
        "direct" if rest.is_empty() => {
            Ok(UpstreamUrl { scheme: Scheme::Direct, host: String::new(), port: 0, username: None })
        }
        "direct" => Err(Rejected::new("direct:// stands alone: it has no host")),
        "https" | "socks5" | "socks5h" | "socks4" | "socks4a" => Err(Rejected::new(format!(
            "{scheme}:// is not in this version; use an HTTP CONNECT proxy: http://host:port"
        ))),
        // Not repeated: without a real scheme this may be a user name and password.
        _ => Err(Rejected::new("the scheme is not known; use http://host:port or direct://")),
    }
}

fn http(rest: &str) -> Result<UpstreamUrl, Rejected> {
    let (authority, tail) = match rest.find(['/', '?', '#']) {
        // A `/` in an unescaped password would hide the `@` behind it.
        Some(_) if rest.contains('@') && !rest[..rest.find(['/', '?', '#']).unwrap_or(0)].contains('@') => {
            return Err(Rejected::new(PASSWORD));
        }
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    if user.is_some_and(|user| user.contains([':', '@'])) {
        return Err(Rejected::new(PASSWORD));
    }
    if !matches!(tail, "" | "/") {
        return Err(Rejected::new("a proxy's URL ends after the port; remove the path"));
    }
    let username = user.map(decode).transpose()?.map(|user| check::username(&user)).transpose()?;
    let (host, port) = split_port(host)?;
    Ok(UpstreamUrl { scheme: Scheme::Http, host, port, username })
}

const PASSWORD: &str = "a password must not stand in the URL, where everybody could read it; keep only the user name there \
                        and give the password with password-file";

fn split_port(text: &str) -> Result<(String, u16), Rejected> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((literal, port)) = rest.split_once(']') else {
            return Err(Rejected::new("the IPv6 address is not closed by ]"));
        };
        if literal.contains('%') {
            return Err(Rejected::new("an IPv6 address with a zone cannot be the proxy; use a global or ULA address"));
        }
        let address: Ipv6Addr =
            literal.parse().map_err(|_| Rejected::new(format!("\"{literal}\" is not an IPv6 address")))?;
        (check::proxy_address(IpAddr::V6(address))?.to_string(), port)
    } else {
        let at = text.find(':').unwrap_or(text.len());
        if text[at..].matches(':').count() > 1 {
            return Err(Rejected::new("an IPv6 address stands in brackets: http://[2001:db8::1]:8080"));
        }
        (check::host(&text[..at])?, &text[at..])
    };
    let Some(port) = port.strip_prefix(':').filter(|port| !port.is_empty()) else {
        return Err(Rejected::new(format!(
            "the port is missing after the host, and proxies have no usual one; write it out, such as http://{}:8080",
            if host.contains(':') { format!("[{host}]") } else { host }
        )));
    };
    Ok((host, check::port(port)?))
}

fn decode(text: &str) -> Result<String, Rejected> {
    let bad = || Rejected::new("the user name in the URL has a broken % escape; write % itself as %25");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Whether `host` looks like an IPv4 address to other programs, though it is none: `127.1` or `0x7f.1`.
pub(super) fn is_odd_number(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let numeric = !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    numeric && host.parse::<Ipv4Addr>().is_err()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn urls_that_are_accepted() {
        for (url, host, port, user) in [
            ("http://proxy.example:8080", "proxy.example", 8080, None),
            ("HTTP://proxy.example:8080/", "proxy.example", 8080, None),
            ("http://ann@proxy:3128", "proxy", 3128, Some("ann")),
            ("http://ann%40corp@proxy:3128", "proxy", 3128, Some("ann@corp")),
            ("http://192.0.2.1:1", "192.0.2.1", 1, None),
            ("http://[2001:DB8::1]:65535", "2001:db8::1", 65535, None),
            ("http://a_b.example.:80", "a_b.example.", 80, None),
        ] {
            let got = parse(url).unwrap();
            assert_eq!((got.host.as_str(), got.port, got.username.as_deref()), (host, port, user), "{url}");
            assert_eq!(got.scheme, Scheme::Http);
        }
        assert_eq!(parse("direct://").unwrap().scheme, Scheme::Direct);
    }

    #[test]
    fn urls_that_are_refused_and_what_the_user_reads() {
        for (url, says) in [
            ("proxy:8080", "no scheme"),
            ("", "no scheme"),
            ("https://proxy:443", "https:// is not in this version"),
            ("socks5://proxy:1080", "socks5:// is not in this version"),
            ("ftp://proxy:21", "scheme is not known"),
            ("direct://proxy:1", "it has no host"),
            ("http://proxy", "port is missing"),
            ("http://proxy:", "port is missing"),
            ("http://[::1]", "write it out, such as http://[::1]:8080"),
            ("http://proxy:0", "port"),
            ("http://proxy:65536", "port"),
            ("http://proxy:+80", "port"),
            ("http://proxy:8a", "port"),
            ("http://:8080", "host name is empty"),
            ("http://proxy:8080/path", "remove the path"),
            ("http://proxy:8080?x", "remove the path"),
            ("http://2001:db8::1:8080", "stands in brackets"),
            ("http://[2001:db8::1:8080", "not closed by ]"),
            ("http://[fe80::1%25eth0]:8080", "zone"),
            ("http://[nonsense]:1", "not an IPv6 address"),
            ("http://[::]:1", "cannot be a proxy's address"),
            ("http://0.0.0.0:1", "cannot be a proxy's address"),
            ("http://127.1:80", "not an IPv4 address"),
            ("http://0x7f.0x1:80", "not an IPv4 address"),
            ("http://bücher.example:80", "xn--"),
            ("http://a b:80", "not a host name"),
            ("http://a..b:80", "not a host name"),
            ("http://-:80", "not a host name"),
            ("http://@proxy:80", "user name is empty"),
            ("http://a%zz@proxy:80", "% escape"),
            ("http://a%3Ab@proxy:80", "colon"),
            ("http://a%0Ab@proxy:80", "control character"),
        ] {
            let error = parse(url).unwrap_err().to_string();
            assert!(error.contains(says), "{url}: {error}");
        }
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        for url in [
            "http://ann:hunter2@proxy:8080",
            "http://ann:@proxy:8080",
            "http://ann:hunter2@x@proxy:8080",
            "http://ann:hunt/er2@proxy:8080",
            "http://ann:hunter2?@proxy:8080",
            "https://ann:hunter2@proxy:8080",
            "ann:hunter2@proxy:8080",
            "hunter2://ann@proxy:8080",
        ] {
            let error = parse(url).unwrap_err().to_string();
            assert!(!error.contains("hunt"), "{url}: {error}");
        }
        let error = parse("http://ann:hunter2@proxy:8080").unwrap_err().to_string();
        assert!(error.contains("password-file"), "{error}");
    }
}
