//! The service with a machine that only takes notes, on a bus of its own with the real polkitd.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command as Process;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxyvpn_dbus::names::{BUS, MANAGER, MANAGER_PATH};
use proxyvpnd::config::store::{Importer, ProfileStore};
use proxyvpnd::log::Log;
use proxyvpnd::machine::{Command, Handle, View};
use proxyvpnd::service::Service;
use rustix::process::{Pid, Signal, Uid, kill_process};
use tokio::sync::{mpsc, watch};
use zbus::connection::Builder;
use zbus::fdo::DBusProxy;
use zbus::names::BusName;
use zbus::{Connection, Message, OwnedVariant};

/// alice may do everything, mallory nothing, dave only ad-hoc; carol is in the group of the sample rule; bob has the defaults.
const RULES: &str = r#"
polkit.addRule(function (action, subject) {
    if (action.id.indexOf("org.proxyvpn1.") !== 0) { return polkit.Result.NOT_HANDLED; }
    if (action.lookup("profile") === "forbidden") { return polkit.Result.NO; }
    if (subject.user === "alice") { return polkit.Result.YES; }
    if (subject.user === "mallory") { return polkit.Result.NO; }
    if (subject.user === "dave" && action.id === "org.proxyvpn1.connect-adhoc") { return polkit.Result.YES; }
    return polkit.Result.NOT_HANDLED;
});
"#;

/// Runs the test `name` on a bus of its own: this program again, in namespaces. True in there.
pub(crate) fn alone(name: &str) -> bool {
    let opted_in = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|value| value == "1");
    assert!(opted_in, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes namespaces");
    if std::env::var_os("PROXYVPN_TEST_BUS").is_some() {
        return true;
    }
    let status = Process::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/private-bus.sh"))
        .args([
            "--user",
            "alice",
            "--user",
            "bob",
            "--user",
            "mallory",
            "--user",
            "dave",
            "--user",
            "carol:proxyvpn-users",
            "-",
        ])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("PROXYVPN_TEST_BUS", "1")
        .status()
        .unwrap();
    assert!(status.success(), "the test failed on its own bus: {status}");
    false
}

/// Runs `body` if this is the inner run of the test `name`.
pub(crate) fn run<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    if !alone(name) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(240), body()).await.expect("the test hangs") });
    runtime.shutdown_background();
}

/// The id of a user.
fn uid(user: &str) -> u32 {
    let output = Process::new("id").args(["-u", user]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// A connection to the bus as `user`: the bus takes the credentials of the connecting thread (unix(7), SO_PEERCRED).
pub(crate) fn builder(user: &str) -> Builder<'static> {
    let uid = uid(user);
    let connecting = std::thread::spawn(move || {
        let id = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(id, id, id).unwrap();
        UnixStream::connect("/run/dbus/system_bus_socket").unwrap()
    });
    Builder::unix_stream(connecting.join().unwrap()).user_id(uid)
}

pub(crate) async fn client(user: &str) -> Connection {
    builder(user).build().await.unwrap()
}

/// The running polkitd.
pub(crate) struct Polkit(Pid);

impl Polkit {
    pub(crate) fn name() -> BusName<'static> {
        BusName::try_from("org.freedesktop.PolicyKit1").unwrap()
    }

    pub(crate) async fn find(client: &Connection) -> Self {
        let pid = DBusProxy::new(client).await.unwrap().get_connection_unix_process_id(Self::name()).await.unwrap();
        Self(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap())
    }

    /// Leaves questions without an answer, until it goes on.
    pub(crate) fn stop(&self) {
        kill_process(self.0, Signal::STOP).unwrap();
    }

    pub(crate) fn go_on(&self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }

    pub(crate) fn kill(&self) {
        kill_process(self.0, Signal::KILL).unwrap();
    }
}

/// What the machine was told.
pub(crate) type Notes = Arc<Mutex<Vec<String>>>;

pub(crate) struct World {
    _service: Service,
    pub(crate) view: watch::Sender<View>,
    pub(crate) notes: Notes,
    pub(crate) log: Log,
}

impl World {
    /// The service as the user that it runs as, with the profiles `work` and `forbidden`.
    pub(crate) async fn new() -> Self {
        let rules = PathBuf::from("/etc/polkit-1/rules.d");
        std::fs::write(rules.join("40-test.rules"), RULES).unwrap();
        let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../polkit/proxyvpn-group.rules");
        std::fs::copy(sample, rules.join("50-proxyvpn-group.rules")).unwrap();

        let dir = PathBuf::from("/run/private-bus/profiles");
        std::fs::create_dir_all(&dir).unwrap();
        let store = Arc::new(ProfileStore::open("/nonexistent", dir));
        for name in ["work", "forbidden"] {
            store.import(name, PROFILE, false, Importer::User).unwrap();
        }
        let (sender, commands) = mpsc::channel(32);
        let (view, receiver) = watch::channel(View::default());
        let notes = Notes::default();
        tokio::spawn(take_notes(commands, Arc::clone(&notes)));
        let log = Log::new(100);
        let handle = Handle { commands: sender, view: receiver };
        let service = Service::start(builder("proxyvpn"), handle, store, log.clone()).await.unwrap();
        Self { _service: service, view, notes, log }
    }

    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap())
    }
}

pub(crate) const PROFILE: &str = "[upstream]\nurl = \"http://proxy.example:8080\"\n";

async fn take_notes(mut commands: mpsc::Receiver<Command>, notes: Notes) {
    while let Some(command) = commands.recv().await {
        let note = match command {
            Command::Connect(request, reply) => {
                reply.send(Ok(())).unwrap();
                let password = request.password.map(|password| password.expose().to_owned());
                format!("connect {} {} {password:?}", request.profile.name, request.profile.upstream)
            }
            Command::Disconnect(reply) => {
                reply.send(Ok(())).unwrap();
                "disconnect".to_owned()
            }
            Command::Reconnect(reply) => {
                reply.send(Ok(())).unwrap();
                "reconnect".to_owned()
            }
            Command::Lockdown(on, reply) => {
                reply.send(Ok(())).unwrap();
                format!(
                    "lockdown {:?}",
                    on.map(|profiles| profiles.into_iter().map(|profile| profile.name).collect::<Vec<_>>())
                )
            }
            Command::Plan(request, reply) => {
                reply.send(Ok(Vec::new())).unwrap();
                format!("plan {}", request.profile.name)
            }
            Command::Diagnose(request, reply) => {
                reply.send(Vec::new()).unwrap();
                format!("diagnose {:?}", request.map(|request| request.profile.name))
            }
            Command::Flows(reply) => {
                reply.send(Vec::new()).unwrap();
                "flows".to_owned()
            }
            Command::Statistics(reply) => {
                reply.send(HashMap::from([("flows".to_owned(), 3)])).unwrap();
                continue;
            }
            Command::NewIdentity(reply) => {
                reply.send(Ok(())).unwrap();
                "new identity".to_owned()
            }
            Command::Circuits(reply) => {
                reply.send(Ok(Vec::new())).unwrap();
                "circuits".to_owned()
            }
        };
        notes.lock().unwrap().push(note);
    }
}

pub(crate) type Options = HashMap<&'static str, OwnedVariant>;

pub(crate) fn options<const N: usize>(pairs: [(&'static str, zbus::Variant<'static>); N]) -> Options {
    pairs.into_iter().map(|(key, value)| (key, OwnedVariant::try_from(value).unwrap())).collect()
}

/// A call; an error as `name: text`.
pub(crate) async fn call<B>(
    client: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
) -> Result<Message, String>
where
    B: serde::Serialize + zbus::DynamicType,
{
    client.call_method(Some(BUS), path, Some(interface), method, body).await.map_err(|error| match error {
        zbus::Error::MethodError(name, text, _) => format!("{name}: {}", text.unwrap_or_default()),
        zbus::Error::FDO(error) => error.to_string(),
        other => panic!("{method}: {other}"),
    })
}

pub(crate) async fn manager<B>(client: &Connection, method: &str, body: &B) -> Result<Message, String>
where
    B: serde::Serialize + zbus::DynamicType,
{
    call(client, MANAGER_PATH, MANAGER, method, body).await
}

/// A pipe that holds `text`; its writer is closed.
pub(crate) fn pipe(text: &str) -> zbus::Fd<'static> {
    use std::io::Write as _;
    let (reader, mut writer) = std::io::pipe().unwrap();
    let text = text.to_owned();
    // More than a pipe holds must not stop the test; a reader that gives up is no error.
    std::thread::spawn(move || writer.write_all(text.as_bytes()));
    std::os::fd::OwnedFd::from(reader).into()
}
