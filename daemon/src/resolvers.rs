//! Which DNS servers the machine uses, and its search list (resolv.conf(5)).

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

/// Most servers that are used.
pub const MAX_SERVERS: usize = 8;
/// Most search domains that are used (as in glibc before 2.26, which bounded them).
const MAX_SEARCH: usize = 6;
/// What a larger file has behind this is not read.
const MAX_FILE: u64 = 64 * 1024;
/// Links behind each other that are followed.
const MAX_LINKS: usize = 8;
/// glibc's bound (`RES_MAXNDOTS`).
const MAX_NDOTS: usize = 15;

/// Where the servers are written.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The machine's own list.
    pub resolv_conf: PathBuf,
    /// The servers behind systemd-resolved's stub.
    pub resolved: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { resolv_conf: "/etc/resolv.conf".into(), resolved: "/run/systemd/resolve/resolv.conf".into() }
    }
}

/// Who named the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The profile or the caller.
    Given,
    /// `/etc/resolv.conf`.
    ResolvConf,
    /// systemd-resolved.
    Resolved,
    /// Nobody.
    Nowhere,
}

/// What the user should know about the servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// No server is known at all.
    NoServer,
    /// Only resolvers on this machine are known, and they have to ask others.
    OnlyLocal(Vec<IpAddr>),
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoServer => f.write_str(
                "/etc/resolv.conf names no DNS server, so names cannot be looked up; name one with --dns or dns.servers",
            ),
            Self::OnlyLocal(local) => write!(
                f,
                "the only DNS server known is on this machine ({}), and the servers that it asks are not known, so they \
                 are blocked and names cannot be looked up; name them with --dns or dns.servers",
                join(local)
            ),
        }
    }
}

/// The servers that the machine uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// Servers outside this machine, at most [`MAX_SERVERS`], each once. A link-local one has lost its zone.
    pub addresses: Vec<IpAddr>,
    /// Resolvers on this machine. They need no exception, but the servers behind them do.
    pub local: Vec<IpAddr>,
    /// Who named them.
    pub origin: Origin,
    /// What the user should know.
    pub warning: Option<Warning>,
}

impl Resolvers {
    /// Whom to ask from this machine: servers outside, else local ones (which answer as long as nothing is blocked).
    #[must_use]
    pub fn for_lookup(&self) -> &[IpAddr] {
        if self.addresses.is_empty() { &self.local } else { &self.addresses }
    }
}

/// The part of resolv.conf(5) that is used here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Servers as they stand there.
    pub servers: Vec<IpAddr>,
    /// Search domains; the last `search` or `domain` line counts.
    pub search: Vec<String>,
    /// A name with as many dots is tried as it is before the search domains are.
    pub ndots: usize,
}

/// Finds the servers: the given ones, else those of `/etc/resolv.conf`, else, if there is none but on this machine, those
/// behind systemd-resolved. Reads up to two small files.
#[must_use]
pub fn find(given: &[IpAddr], paths: &Paths) -> Resolvers {
    if !given.is_empty() {
        return choose(given, None, None);
    }
    choose(given, read(&paths.resolv_conf).as_deref(), read(&paths.resolved).as_deref())
}

/// The folders in which a change of the servers shows: those of the files, and of what they are links to. For one that is not
/// there, the nearest above it.
#[must_use]
pub fn folders(paths: &Paths) -> Vec<PathBuf> {
    let mut folders = vec![];
    for path in [&paths.resolv_conf, &paths.resolved] {
        let mut path = path.clone();
        for _ in 0..MAX_LINKS {
            let folder = path.ancestors().skip(1).find(|folder| folder.is_dir()).map(Path::to_path_buf);
            folders.extend(folder.filter(|folder| !folders.contains(folder)));
            let Ok(target) = std::fs::read_link(&path) else { break };
            path = path.parent().unwrap_or(Path::new("/")).join(target);
        }
    }
    folders
}

/// [`find`] over the contents of the files; `None` for one that is not there.
#[must_use]
pub fn choose(given: &[IpAddr], resolv_conf: Option<&str>, resolved: Option<&str>) -> Resolvers {
    let servers = |text: Option<&str>| text.map(parse).unwrap_or_default().servers;
    if !given.is_empty() {
        let (addresses, local) = split(given);
        return Resolvers { addresses, local, origin: Origin::Given, warning: None };
    }
    let (addresses, local) = split(&servers(resolv_conf));
    if !addresses.is_empty() {
        return Resolvers { addresses, local, origin: Origin::ResolvConf, warning: None };
    }
    let (addresses, _) = split(&servers(resolved));
    if !addresses.is_empty() {
        return Resolvers { addresses, local, origin: Origin::Resolved, warning: None };
    }
    let warning = if local.is_empty() { Warning::NoServer } else { Warning::OnlyLocal(local.clone()) };
    Resolvers { addresses, local, origin: Origin::Nowhere, warning: Some(warning) }
}

/// Reads resolv.conf(5) as glibc does: a keyword at the start of the line, the last `search` or `domain` wins. Lines that
/// make no sense are skipped.
#[must_use]
pub fn parse(text: &str) -> ResolvConf {
    let mut conf = ResolvConf { ndots: 1, ..ResolvConf::default() };
    for line in text.lines() {
        // An indented line is none to glibc, and `#` or `;` only starts a comment at the start of a word.
        if line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        let mut words = line.split_whitespace().take_while(|word| !word.starts_with(['#', ';']));
        match words.next() {
            Some("nameserver") => conf.servers.extend(words.next().and_then(server)),
            Some("search") => conf.search = words.take(MAX_SEARCH).map(domain).filter(|d| !d.is_empty()).collect(),
            Some("domain") => conf.search = words.take(1).map(domain).filter(|d| !d.is_empty()).collect(),
            Some("options") => {
                let ndots = words.filter_map(|word| word.strip_prefix("ndots:")?.parse::<usize>().ok()).last();
                conf.ndots = ndots.map_or(conf.ndots, |ndots| ndots.min(MAX_NDOTS));
            }
            _ => {}
        }
    }
    conf
}

/// The text of a file; `None` when it is not there or is no file. It may be a link, as systemd-resolved makes it.
pub(crate) fn read(path: &Path) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = openat(CWD, path, flags, Mode::empty()).ok()?;
    if FileType::from_raw_mode(fstat(&fd).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut bytes = Vec::new();
    File::from(fd).take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn server(word: &str) -> Option<IpAddr> {
    word.split('%').next()?.parse().ok()
}

fn domain(word: &str) -> String {
    word.trim_matches('.').to_ascii_lowercase()
}

/// Servers outside and on this machine, each once.
fn split(servers: &[IpAddr]) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let (mut outside, mut local) = (Vec::new(), Vec::new());
    for server in servers.iter().map(IpAddr::to_canonical).filter(|server| !server.is_multicast()) {
        // The unspecified address means this machine to glibc.
        let list = if server.is_loopback() || server.is_unspecified() { &mut local } else { &mut outside };
        if list.len() < MAX_SERVERS && !list.contains(&server) {
            list.push(server);
        }
    }
    (outside, local)
}

pub(crate) fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn addresses(list: &str) -> Vec<IpAddr> {
        list.split_whitespace().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn the_first_list_with_a_server_outside_wins() {
        const STUB: &str = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";
        const REAL: &str = "nameserver 192.0.2.1\n";
        const OTHER: &str = "nameserver 192.0.2.2\n";
        type Row<'a> = (&'a str, Option<&'a str>, Option<&'a str>, &'a str, &'a str, Origin);
        let rows: &[Row<'_>] = &[
            ("192.0.2.9", Some(REAL), Some(OTHER), "192.0.2.9", "", Origin::Given),
            ("127.0.0.1", Some(REAL), Some(OTHER), "", "127.0.0.1", Origin::Given),
            ("", Some(REAL), Some(OTHER), "192.0.2.1", "", Origin::ResolvConf),
            ("", Some(STUB), Some(OTHER), "192.0.2.2", "127.0.0.53", Origin::Resolved),
            ("", Some(""), Some(OTHER), "192.0.2.2", "", Origin::Resolved),
            ("", None, Some(OTHER), "192.0.2.2", "", Origin::Resolved),
            ("", Some(STUB), None, "", "127.0.0.53", Origin::Nowhere),
            ("", Some(STUB), Some(STUB), "", "127.0.0.53", Origin::Nowhere),
            ("", None, None, "", "", Origin::Nowhere),
            (
                "",
                Some("nameserver 127.0.0.53\nnameserver 192.0.2.1\n"),
                Some(OTHER),
                "192.0.2.1",
                "127.0.0.53",
                Origin::ResolvConf,
            ),
            (
                "",
                Some("nameserver ::1\nnameserver 0.0.0.0\nnameserver ::ffff:127.0.0.1\n"),
                None,
                "",
                "::1 0.0.0.0 127.0.0.1",
                Origin::Nowhere,
            ),
        ];
        for (given, resolv_conf, resolved, outside, local, origin) in rows {
            let got = choose(&addresses(given), *resolv_conf, *resolved);
            assert_eq!(
                (got.addresses, got.local, got.origin),
                (addresses(outside), addresses(local), *origin),
                "{given:?} {resolv_conf:?} {resolved:?}"
            );
            assert_eq!(got.warning.is_some(), *origin == Origin::Nowhere);
        }
    }

    #[test]
    fn a_warning_says_why_and_what_to_do() {
        let none = choose(&[], None, None);
        assert!(none.warning.unwrap().to_string().contains("names no DNS server"));
        let stub = choose(&[], Some("nameserver 127.0.0.53\n"), None);
        let text = stub.warning.clone().unwrap().to_string();
        assert!(text.contains("(127.0.0.53)") && text.contains("dns.servers"), "{text}");
        assert_eq!(stub.for_lookup(), addresses("127.0.0.53"));
    }

    #[test]
    fn resolv_conf_is_read_as_glibc_does() {
        let text = "# comment\n; comment\nnameserver\t192.0.2.1\nnameserver  fe80::1%eth0 # zone\n nameserver 192.0.2.7\n\
                    nameserver nonsense\nnameserver\nnameserverx 192.0.2.8\nnameserver 192.0.2.1\nnameserver ff02::fb\n\
                    domain Corp.Example.\nsearch a.example b.example\r\noptions timeout:1 ndots:2 ndots:99\n";
        let conf = parse(text);
        assert_eq!(conf.servers, addresses("192.0.2.1 fe80::1 192.0.2.1 ff02::fb"));
        assert_eq!(conf.search, ["a.example", "b.example"]);
        assert_eq!(conf.ndots, 15);
        assert_eq!(choose(&[], Some(text), None).addresses, addresses("192.0.2.1 fe80::1"));
        assert_eq!(parse("search a\ndomain Corp.Example.\n").search, ["corp.example"]);
        assert_eq!(parse("").ndots, 1);
    }

    #[test]
    fn the_folders_are_those_of_links_and_of_what_they_lead_to() {
        let dir = crate::test_dir::TestDir::new("resolver-folders");
        for folder in ["etc", "run", "run/other"] {
            std::fs::create_dir(dir.path(folder)).unwrap();
        }
        let paths = Paths { resolv_conf: dir.path("etc/resolv.conf"), resolved: dir.path("run/resolve/resolv.conf") };
        let names = || -> Vec<String> {
            let root = dir.path("");
            folders(&paths).iter().map(|path| path.strip_prefix(&root).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(), ["etc", "run"]);
        std::os::unix::fs::symlink("../run/other/stub.conf", &paths.resolv_conf).unwrap();
        std::fs::create_dir(dir.path("run/resolve")).unwrap();
        assert_eq!(names(), ["etc", "etc/../run/other", "run/resolve"]);
        std::os::unix::fs::symlink("stub.conf", dir.path("run/other/stub.conf")).unwrap();
        assert_eq!(names(), ["etc", "etc/../run/other", "run/resolve"], "a link to itself ends");
    }

    #[test]
    fn at_most_eight_servers_count() {
        let text: String = (1..=20).map(|n| format!("nameserver 192.0.2.{n}\n")).collect();
        assert_eq!(choose(&[], Some(&text), None).addresses.len(), MAX_SERVERS);
    }

    #[test]
    fn files_are_read_through_links_but_never_waited_for() {
        let dir = crate::test_dir::TestDir::new("resolvers");
        let (file, link, fifo) = (dir.path("file"), dir.path("link"), dir.path("fifo"));
        std::fs::write(&file, b"nameserver 192.0.2.1\n\xff\xfe\n").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR).unwrap();
        let with = |path: &Path| Paths { resolv_conf: path.into(), resolved: dir.path("none") };
        assert_eq!(find(&[], &with(&link)).addresses, addresses("192.0.2.1"));
        assert_eq!(find(&[], &with(&fifo)).origin, Origin::Nowhere);
        assert_eq!(find(&[], &with(&dir.path(""))).origin, Origin::Nowhere);
        std::fs::write(&file, "#".repeat(70_000) + "\nnameserver 192.0.2.1\n").unwrap();
        assert_eq!(find(&[], &with(&file)).origin, Origin::Nowhere, "what is behind the bound is not read");
    }
}
