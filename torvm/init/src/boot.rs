//! File systems, kernel modules and kernel settings.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use crate::error::{Error, While as _};

/// The image's modules; their names begin with numbers in the order of loading.
const MODULES: &str = "/modules";
/// Files that Tor may have open: a connection of the host is one, and one on its way out carries many.
const OPEN_FILES: u64 = 65_536;

/// Below /proc/sys. What is missing is an error.
const SETTINGS: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv4/conf/all/rp_filter", "1"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    ("net/ipv4/conf/all/arp_ignore", "1"),
    ("net/ipv4/conf/all/arp_announce", "2"),
    // Every refused packet of the host is answered: it is the only one to ask.
    ("net/ipv4/icmp_ratelimit", "0"),
    ("net/ipv4/icmp_msgs_per_sec", "10000"),
    // By its own measure the kernel would follow 2048 connections on a machine of 256 MiB, and drop what comes after. These take 10 MB at most.
    ("net/netfilter/nf_conntrack_max", "32768"),
    ("net/netfilter/nf_conntrack_buckets", "8192"),
    ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "10"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/sysrq", "0"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("user/max_user_namespaces", "0"),
];
/// As [`SETTINGS`], where the kernel has IPv6 at all.
const IPV6_SETTINGS: &[(&str, &str)] =
    &[("net/ipv6/conf/all/disable_ipv6", "1"), ("net/ipv6/conf/default/disable_ipv6", "1")];

/// Mounts the kernel's file systems and `/run`.
pub(crate) fn mount() -> Result<(), Error> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (kind, target, flags, data) in [
        ("proc", "/proc", quiet | MountFlags::NODEV, c""),
        ("sysfs", "/sys", quiet | MountFlags::NODEV, c""),
        ("devtmpfs", "/dev", quiet, c"mode=0755"),
        ("tmpfs", "/run", quiet | MountFlags::NODEV, c"mode=0755,size=1m"),
    ] {
        rustix::mount::mount(kind, target, kind, flags, data).during(format!("mount {target}"))?;
    }
    Ok(())
}

/// Loads all modules of the image.
pub(crate) fn load_modules() -> Result<(), Error> {
    let mut files: Vec<_> = fs::read_dir(MODULES)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>())
        .during(format!("read {MODULES}"))?;
    files.sort();
    for path in files {
        match load(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {} // built in
            loaded => loaded.during(format!("load {}", path.display()))?,
        }
    }
    Ok(())
}

fn load(path: &Path) -> io::Result<()> {
    Ok(rustix::system::finit_module(File::open(path)?, c"", 0)?)
}

/// Forbids to load more of them, and frees the memory where they lie.
pub(crate) fn lock_modules() -> Result<(), Error> {
    set("kernel/modules_disabled", "1")?;
    fs::remove_dir_all(MODULES).during(format!("remove {MODULES}"))
}

/// What everything started from here on inherits: no way to more privileges, and files enough for Tor.
pub(crate) fn set_limits() -> Result<(), Error> {
    rustix::thread::set_no_new_privs(true).during("set no_new_privs")?;
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    rustix::process::setrlimit(Resource::Nofile, limit).during("set the limit of open files")?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .during("forbid core dumps")
}

/// Kernel settings: no forwarding, no IPv6, strict reverse path.
pub(crate) fn set_kernel() -> Result<(), Error> {
    for (name, value) in SETTINGS {
        set(name, value)?;
    }
    if Path::new("/proc/sys/net/ipv6").exists() {
        for (name, value) in IPV6_SETTINGS {
            set(name, value)?;
        }
    }
    Ok(())
}

fn set(name: &str, value: &str) -> Result<(), Error> {
    fs::write(Path::new("/proc/sys").join(name), value).during(format!("set {name} to {value}"))
}
