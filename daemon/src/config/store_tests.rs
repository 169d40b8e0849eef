#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::*;
use crate::test_dir::TestDir;

const GOOD: &str = "[upstream]\nurl = \"http://proxy.example:8080\"\n";
const OTHER: &str = "[upstream]\nurl = \"http://other.example:8080\"\n";
const BAD: &str = "[upstream]\nurl = \"http://ann:hunter2@proxy.example:8080\"\n";

/// A store in two directories of our own; "root" is whoever runs the test.
struct Bench {
    store: ProfileStore,
    dir: TestDir,
}

impl Bench {
    fn new() -> Self {
        let dir = TestDir::new("store");
        for place in ["system", "imported"] {
            std::fs::create_dir(dir.path(place)).unwrap();
            mode(&dir.path(place), 0o755);
        }
        let store = ProfileStore::owned(dir.path("system"), dir.path("imported"), geteuid().as_raw());
        Self { store, dir }
    }

    fn put(&self, file: &str, text: &str) -> PathBuf {
        let path = self.dir.path(file);
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o644);
        path
    }

    /// What the user reads when a profile of that name is wanted.
    fn says(&self, name: &str) -> String {
        self.store.get(name).unwrap_err().to_string()
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn names(store: &ProfileStore) -> Vec<(String, Origin, bool)> {
    store.list().into_iter().map(|entry| (entry.name, entry.origin, entry.result.is_ok())).collect()
}

#[test]
fn profiles_of_both_places_are_listed_and_the_administrators_wins() {
    let bench = Bench::new();
    bench.put("system/b.toml", GOOD);
    bench.put("imported/b.toml", OTHER);
    bench.put("imported/a.toml", OTHER);
    bench.put("imported/c.toml", BAD);
    bench.put("imported/.hidden.toml", GOOD);
    bench.put("imported/readme", "");
    let want = [
        ("a".to_owned(), Origin::Imported, true),
        ("b".to_owned(), Origin::System, true),
        ("c".to_owned(), Origin::Imported, false),
    ];
    assert_eq!(names(&bench.store), want);
    assert_eq!(bench.store.get("b").unwrap().upstream.host, "proxy.example");
    assert_eq!(bench.store.text("a").unwrap(), OTHER);
}

#[test]
fn a_text_with_a_password_is_never_given_out() {
    let bench = Bench::new();
    bench.put("system/c.toml", BAD);
    let error = bench.store.text("c").unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)));
    assert!(error.to_string().contains("c.toml:2:7: a password"), "{error}");
    assert!(!error.to_string().contains("hunter2"));
}

#[test]
fn places_that_are_not_there_are_empty() {
    let dir = TestDir::new("store");
    let store = ProfileStore::open(dir.path("none"), dir.path("nothing"));
    assert!(store.list().is_empty());
    assert!(matches!(store.get("a"), Err(StoreError::NotFound { .. })));
    assert!(matches!(store.remove("a"), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_name_cannot_leave_the_directory() {
    let bench = Bench::new();
    bench.put("secret.toml", GOOD);
    for name in ["../secret", "/etc/passwd", "", ".", "a\0b", "\x1b[31m"] {
        assert!(matches!(bench.store.get(name), Err(StoreError::NotFound { .. })), "{name:?}");
        assert!(matches!(bench.store.remove(name), Err(StoreError::NotFound { .. })), "{name:?}");
        assert!(matches!(bench.store.import(name, GOOD, true, Importer::User), Err(StoreError::Name(_))), "{name:?}");
    }
    assert!(!bench.says("\x1b[31m").contains('\x1b'));
}

#[test]
fn a_file_that_others_could_have_written_is_refused_with_the_remedy() {
    let bench = Bench::new();
    for (bits, bad) in [(0o644, false), (0o600, false), (0o664, true), (0o646, true), (0o666, true)] {
        let path = bench.put("system/a.toml", GOOD);
        mode(&path, bits);
        assert_eq!(bench.store.get("a").is_err(), bad, "{bits:o}");
        if bad {
            let want = format!("(mode {bits:04o}); mend it with: chmod go-w {}", path.display());
            assert!(bench.says("a").contains(&want), "{}", bench.says("a"));
        }
    }
}

#[test]
fn a_file_of_somebody_else_is_refused_with_the_remedy() {
    let bench = Bench::new();
    let own = geteuid().as_raw();
    let path = bench.put("system/a.toml", GOOD);
    let store = ProfileStore::owned(bench.dir.path("system"), bench.dir.path("imported"), own + 1);
    let error = store.get("a").unwrap_err().to_string();
    assert!(error.contains(&format!("belongs to user id {own}")), "{error}");
    assert!(error.contains(&format!("chown {}", own + 1)), "{error}");
    // The file alone, in a directory that is right.
    if own != 0 {
        eprintln!("skipped: giving a file away needs root");
        return;
    }
    std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
    assert!(bench.says("a").contains("a.toml belongs to user id 12345"), "{}", bench.says("a"));
    let imported = bench.put("imported/b.toml", GOOD);
    std::os::unix::fs::chown(&imported, Some(12345), None).unwrap();
    assert!(bench.says("b").contains("b.toml belongs to user id 12345"), "{}", bench.says("b"));
}

#[test]
fn a_directory_that_others_could_write_is_refused_with_the_remedy() {
    let bench = Bench::new();
    bench.put("system/a.toml", GOOD);
    mode(&bench.dir.path("system"), 0o775);
    let want = format!("chmod go-w {}", bench.dir.path("system").display());
    assert!(bench.says("a").contains(&want), "{}", bench.says("a"));
    assert_eq!(names(&bench.store), [("a".to_owned(), Origin::System, false)]);
    mode(&bench.dir.path("imported"), 0o777);
    assert!(bench.store.import("b", GOOD, false, Importer::User).unwrap_err().to_string().contains("chmod go-w"));
}

#[test]
fn what_is_no_plain_file_is_refused_and_never_waited_for() {
    let bench = Bench::new();
    let target = bench.put("target", GOOD);
    symlink(&target, bench.dir.path("system/link.toml")).unwrap();
    symlink("nowhere", bench.dir.path("system/dangling.toml")).unwrap();
    std::fs::create_dir(bench.dir.path("system/dir.toml")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, bench.dir.path("system/fifo.toml"), Mode::RUSR).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bench.dir.path("system/socket.toml")).unwrap();
    for (name, says) in [
        ("link", "is a symbolic link"),
        ("dangling", "is a symbolic link"),
        ("dir", "is not a regular file"),
        ("fifo", "is not a regular file"),
        ("socket", "is not a regular file"),
    ] {
        assert!(bench.says(name).contains(says), "{name}: {}", bench.says(name));
    }
    let elsewhere = bench.dir.path("elsewhere");
    symlink(bench.dir.path("system"), &elsewhere).unwrap();
    let store = ProfileStore::owned(elsewhere, bench.dir.path("imported"), geteuid().as_raw());
    assert!(store.get("a").unwrap_err().to_string().contains("not a directory"), "a link to a directory");
    assert!(
        store.import("a", GOOD, false, Importer::User).is_err(),
        "whether the name is the administrator's cannot be told"
    );
}

#[test]
fn size_and_encoding_are_bounded() {
    let bench = Bench::new();
    let path = bench.put("system/a.toml", &format!("{GOOD}#{}", "x".repeat(MAX_TEXT)));
    assert!(bench.says("a").contains("larger than 65536 bytes"), "{}", bench.says("a"));
    std::fs::write(path, b"\xff").unwrap();
    assert!(bench.says("a").contains("not UTF-8"), "{}", bench.says("a"));
    let long = format!("{GOOD}#{}", "x".repeat(MAX_TEXT));
    assert!(matches!(bench.store.import("b", &long, false, Importer::User), Err(StoreError::TooLong)));
}

#[test]
fn an_import_is_checked_written_whole_and_private() {
    let bench = Bench::new();
    let error = bench.store.import("a", BAD, false, Importer::User).unwrap_err().to_string();
    assert!(error.starts_with("a.toml:2:7: "), "{error}");
    assert!(bench.store.list().is_empty(), "nothing of a bad text stays");
    assert_eq!(bench.store.import("a", GOOD, false, Importer::User).unwrap().name, "a");
    let path = bench.dir.path("imported/a.toml");
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert!(matches!(bench.store.import("a", OTHER, false, Importer::User), Err(StoreError::Exists { .. })));
    assert_eq!(bench.store.text("a").unwrap(), GOOD);
    bench.store.import("a", OTHER, true, Importer::User).unwrap();
    assert_eq!(bench.store.text("a").unwrap(), OTHER);
    let left: Vec<_> = std::fs::read_dir(bench.dir.path("imported")).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary file stays: {left:?}");
    bench.store.remove("a").unwrap();
    assert!(matches!(bench.store.remove("a"), Err(StoreError::NotFound { .. })));
}

#[test]
fn an_import_neither_follows_a_link_nor_trips_over_a_crash() {
    let bench = Bench::new();
    let victim = bench.put("victim", "untouched");
    symlink(&victim, bench.dir.path("imported/.a.toml.new")).unwrap();
    symlink(&victim, bench.dir.path("imported/a.toml")).unwrap();
    assert!(matches!(bench.store.import("a", GOOD, false, Importer::User), Err(StoreError::Exists { .. })));
    bench.store.import("a", GOOD, true, Importer::User).unwrap();
    assert_eq!(std::fs::read_to_string(victim).unwrap(), "untouched");
    assert_eq!(bench.store.text("a").unwrap(), GOOD);
}

#[test]
fn the_imported_directory_is_made_when_it_is_needed() {
    let bench = Bench::new();
    let path = bench.dir.path("new");
    let store = ProfileStore::owned(bench.dir.path("system"), path.clone(), geteuid().as_raw());
    store.import("a", GOOD, false, Importer::User).unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn the_administrators_profiles_are_neither_hidden_nor_removed() {
    let bench = Bench::new();
    // Even one that cannot be used: it must not be replaced by a caller's.
    for text in [GOOD, BAD] {
        bench.put("system/a.toml", text);
        for replace in [false, true] {
            let error = bench.store.import("a", OTHER, replace, Importer::User).unwrap_err();
            assert!(matches!(error, StoreError::Protected { .. }), "{error}");
        }
        assert!(matches!(bench.store.remove("a"), Err(StoreError::Protected { .. })));
    }
    bench.put("imported/a.toml", OTHER);
    assert!(bench.store.get("a").is_err(), "the broken one of the administrator still hides the imported one");
}

#[test]
fn the_number_of_profiles_is_bounded() {
    let bench = Bench::new();
    for number in 0..MAX_PROFILES {
        bench.put(&format!("imported/p{number}.toml"), GOOD);
    }
    assert!(matches!(bench.store.import("one-more", GOOD, false, Importer::User), Err(StoreError::Full)));
    bench.store.import("p0", OTHER, true, Importer::User).unwrap();
    bench.put("imported/over.toml", GOOD);
    assert_eq!(bench.store.list().len(), MAX_PROFILES);
}

#[test]
fn a_stored_password_is_given_to_a_proxy_only_by_root() {
    let bench = Bench::new();
    let tor = "backend = \"torvm\"\n[torvm]\nsocks5-proxy = \"proxy.example:1080\"\nproxy-username = \"me\"\n\
               proxy-password-file = \"/etc/proxyvpn/other.secret\"\n";
    assert!(matches!(bench.store.import("mine", tor, false, Importer::User), Err(StoreError::Secret)));
    for line in ["password-file = \"/etc/proxyvpn/other.secret\"", "password-credential = \"other\""] {
        let text = format!("[upstream]\nurl = \"http://me@proxy.example:8080\"\n{line}\n");
        let error = bench.store.import("mine", &text, false, Importer::User).unwrap_err();
        assert!(matches!(error, StoreError::Secret) && error.to_string().contains("sudo"), "{error}");
        assert!(matches!(bench.store.get("mine"), Err(StoreError::NotFound { .. })));
        bench.store.import("mine", &text, false, Importer::Root).unwrap();
        bench.store.remove("mine").unwrap();
    }
}

#[test]
fn bridges_are_set_in_an_imported_profile_and_nowhere_else() {
    let bench = Bench::new();
    let bridges = ["obfs4 192.0.2.1:443 cert=a".parse().unwrap()];
    let set = |name: &str| bench.store.set_bridges(name, &bridges, Transport::Obfs4);
    assert!(matches!(set("tor"), Err(StoreError::NotFound { .. })));
    assert!(matches!(set("../tor"), Err(StoreError::NotFound { .. })));
    let tor = "# mine\nbackend = \"torvm\"\n[upstream]\nurl = \"http://me@proxy.example:8080\"\npassword-file = \"/etc/proxyvpn/p\"\n";
    bench.store.import("tor", tor, false, Importer::Root).unwrap();
    set("tor").unwrap();
    let text = bench.store.text("tor").unwrap();
    assert!(text.starts_with(tor) && text.contains("cert=a"), "{text}");
    assert_eq!(bench.store.get("tor").unwrap().torvm.unwrap().tor.bridges(), bridges);
    bench.store.import("plain", GOOD, false, Importer::User).unwrap();
    assert!(matches!(set("plain"), Err(StoreError::WithoutTor { .. })));
    bench
        .store
        .import("nodes", "backend = \"torvm\"\n[torvm]\nentry-nodes = [\"{de}\"]\n", false, Importer::User)
        .unwrap();
    let error = set("nodes").unwrap_err().to_string();
    assert!(error.contains("remove entry-nodes or bridges"), "{error}");
    assert!(bench.store.text("nodes").unwrap().ends_with("[\"{de}\"]\n"), "nothing was written");
    bench.put("system/admin.toml", tor);
    assert!(matches!(set("admin"), Err(StoreError::Protected { .. })));
}
