//! A private bus, and a daemon on it that plays what the test wrote down.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxyvpn_dbus::types::{Bootstrap, Check, Circuit, Flow, HealthItem, LogRecord, PlanStep, Progress, Reason};
use proxyvpn_dbus::{Error, names};
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant, fdo};

/// A message bus of its own in a directory of its own; both go with it.
pub(crate) struct TestBus {
    pub(crate) directory: PathBuf,
    pub(crate) address: String,
    daemon: Child,
}

impl TestBus {
    pub(crate) fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("proxyctl-bus-{}-{number}", std::process::id()));
        std::fs::create_dir_all(directory.join("services")).unwrap();
        let shown = directory.display();
        let config = format!(
            "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\" \
             \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\"><busconfig><type>session</type>\
             <listen>unix:path={shown}/bus</listen><auth>EXTERNAL</auth><servicedir>{shown}/services</servicedir>\
             <policy context=\"default\"><allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy>\
             </busconfig>"
        );
        std::fs::write(directory.join("bus.conf"), config).unwrap();
        let mut daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={shown}/bus.conf"))
            .args(["--nofork", "--nopidfile", "--print-address"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("dbus-daemon is needed for this test");
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { directory, address: address.trim().to_owned(), daemon }
    }

    /// A service that the bus starts by this command line.
    pub(crate) fn activatable(&self, command: &str) {
        let service = format!("[D-BUS Service]\nName={}\nExec={command}\n", names::BUS);
        std::fs::write(self.directory.join("services/org.proxyvpn1.service"), service).unwrap();
    }

    /// proxyctl on this bus, away from the settings of whoever runs the tests.
    pub(crate) fn command(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_proxyctl"));
        command
            .args(args)
            .env("DBUS_SYSTEM_BUS_ADDRESS", &self.address)
            .env("XDG_RUNTIME_DIR", &self.directory)
            .env_remove("SSH_CONNECTION")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs it to its end.
    pub(crate) async fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().unwrap()).await
    }
}

impl Drop for TestBus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What a run of proxyctl gave.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) async fn finish(child: tokio::process::Child) -> Ran {
    let output =
        tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.expect("it hangs").unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What the daemon does after it accepted a call.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Pause(u64),
    State(&'static str, &'static str, &'static str, &'static str),
    /// The state changes and nobody is told.
    Silent(&'static str, &'static str, &'static str),
    Progress(u32, &'static str),
    /// Tor's percent, summary, warning and hint.
    Tor(u32, &'static str, &'static str, &'static str),
    /// The daemon is gone from the bus.
    Vanish,
}

/// What the test wrote down, and what the daemon saw.
#[derive(Default)]
pub(crate) struct Script {
    /// Error of every call that needs authorisation.
    pub(crate) error: Option<fn(String) -> Error>,
    pub(crate) error_text: String,
    /// No call is ever answered.
    pub(crate) hang: bool,
    /// The bus connection breaks instead of an answer.
    pub(crate) die: bool,
    pub(crate) steps: Vec<Step>,
    pub(crate) state: String,
    pub(crate) phase: String,
    pub(crate) reason: Reason,
    pub(crate) progress: Progress,
    pub(crate) since: u64,
    pub(crate) blocking: bool,
    pub(crate) lockdown: bool,
    pub(crate) health: Vec<HealthItem>,
    pub(crate) plan: Vec<PlanStep>,
    pub(crate) checks: Vec<Check>,
    pub(crate) log: Vec<LogRecord>,
    pub(crate) log_error: bool,
    pub(crate) later_log: Vec<LogRecord>,
    pub(crate) flows: Vec<Flow>,
    /// The torvm backend runs.
    pub(crate) torvm: bool,
    pub(crate) bootstrap: Bootstrap,
    pub(crate) circuits: Vec<Circuit>,
    pub(crate) calls: Vec<String>,
    pub(crate) received: Vec<String>,
}

pub(crate) type Shared = Arc<Mutex<Script>>;

/// The daemon of a test.
pub(crate) struct Daemon {
    pub(crate) script: Shared,
    connection: Connection,
}

impl Daemon {
    pub(crate) async fn start(bus: &TestBus, mut script: Script) -> Self {
        if script.state.is_empty() {
            script.state = "disconnected".to_owned();
        }
        script.since = script.since.max(1);
        let script = Arc::new(Mutex::new(script));
        let connection = zbus::connection::Builder::address(bus.address.as_str())
            .serve_at(names::MANAGER_PATH, fdo::ObjectManager)
            .serve_at(names::MANAGER_PATH, Manager(script.clone()))
            .serve_at(names::TORVM_PATH, TorVm(script.clone()))
            .name(names::BUS)
            .build();
        let connection =
            tokio::time::timeout(Duration::from_secs(10), connection).await.expect("the bus is silent").unwrap();
        Self { script, connection }
    }

    /// A daemon that goes these steps after a call.
    pub(crate) async fn stepping(bus: &TestBus, steps: &[Step]) -> Self {
        Self::start(bus, Script { steps: steps.to_vec(), ..Script::default() }).await
    }

    pub(crate) async fn profile(&self, name: &str, text: &str) {
        let backend = if text.contains("torvm") { "torvm" } else { "proxy" };
        let profile = Profile { name: name.to_owned(), backend, text: text.to_owned() };
        self.connection.object_server().at(names::profile_path(name), profile).await.unwrap();
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.script.lock().unwrap().calls.clone()
    }

    pub(crate) fn play(&self) {
        tokio::spawn(play(self.script.clone(), self.connection.clone()));
    }

    /// Another service's name on the same connection, such as polkit's.
    pub(crate) async fn own(&self, name: &'static str) {
        self.connection.request_name(name).await.unwrap();
    }
}

async fn play(script: Shared, connection: Connection) {
    let steps = script.lock().unwrap().steps.clone();
    for step in steps {
        match step {
            Step::Pause(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
            Step::State(state, phase, code, text) => {
                let reason = Reason { code: code.to_owned(), text: text.to_owned() };
                script.lock().unwrap().enter(state, phase, &reason);
                connection
                    .emit_signal(
                        None::<&str>,
                        names::MANAGER_PATH,
                        names::MANAGER,
                        "StateChanged",
                        &(state, phase, reason),
                    )
                    .await
                    .unwrap();
            }
            Step::Silent(state, code, text) => {
                let reason = Reason { code: code.to_owned(), text: text.to_owned() };
                script.lock().unwrap().enter(state, "", &reason);
            }
            Step::Progress(percent, summary) => {
                let progress = Progress { percent, summary: summary.to_owned() };
                script.lock().unwrap().progress = progress.clone();
                change(&connection, names::MANAGER_PATH, names::MANAGER, "Progress", progress.into()).await;
            }
            Step::Tor(percent, summary, warning, hint) => {
                let reason = if warning.is_empty() { "" } else { "TIMEOUT" };
                let [tag, summary, warning, reason, hint] =
                    ["conn_or", summary, warning, reason, hint].map(str::to_owned);
                let bootstrap = Bootstrap { percent, tag, summary, warning, reason, hint };
                script.lock().unwrap().bootstrap = bootstrap.clone();
                change(&connection, names::TORVM_PATH, names::TORVM, "Bootstrap", bootstrap.into()).await;
            }
            Step::Vanish => {
                let _ = connection.clone().close().await;
            }
        }
    }
}

/// `PropertiesChanged` of one property.
async fn change(connection: &Connection, path: &str, interface: &str, property: &str, value: Variant<'static>) {
    let body = (interface, HashMap::from([(property, value)]), Vec::<&str>::new());
    let member = "PropertiesChanged";
    connection.emit_signal(None::<&str>, path, "org.freedesktop.DBus.Properties", member, &body).await.unwrap();
}

impl Script {
    fn enter(&mut self, state: &str, phase: &str, reason: &Reason) {
        if self.state != state {
            self.since += 1;
        }
        (self.state, self.phase, self.reason) = (state.to_owned(), phase.to_owned(), reason.clone());
    }
}

struct Manager(Shared);

type Options = HashMap<String, OwnedVariant>;

/// What every call that needs authorisation does first.
async fn accept(script: &Shared, connection: &Connection, call: String) -> Result<(), Error> {
    let (hang, die, error) = {
        let mut script = script.lock().unwrap();
        script.calls.push(call);
        (script.hang, script.die, script.error.map(|error| error(script.error_text.clone())))
    };
    if die {
        let _ = connection.clone().close().await;
    }
    if hang || die {
        std::future::pending::<()>().await;
    }
    error.map_or(Ok(()), Err)
}

impl Manager {
    async fn accept(&self, connection: &Connection, call: String) -> Result<(), Error> {
        accept(&self.0, connection, call).await
    }

    fn describe(&self, call: &str, name: &str, mut options: Options) -> String {
        if let Some(fd) = options.remove("password") {
            let fd = zbus::Fd::try_from(fd).unwrap();
            let mut text = String::new();
            let mut file = std::fs::File::from(std::os::fd::OwnedFd::try_from(fd).unwrap());
            std::io::Read::read_to_string(&mut file, &mut text).unwrap();
            self.0.lock().unwrap().received.push(text);
        }
        let mut options: Vec<String> =
            options.iter().map(|(key, value)| format!(" {key}={}", Variant::try_from(value).unwrap())).collect();
        options.sort();
        format!("{call} '{name}'{}", options.concat())
    }
}

#[zbus::interface(name = "org.proxyvpn1.Manager")]
impl Manager {
    async fn connect(
        &self,
        profile: String,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        let call = self.describe("Connect", &profile, options);
        self.accept(connection, call).await?;
        tokio::spawn(play(self.0.clone(), connection.clone()));
        Ok(())
    }

    async fn disconnect(&self, options: Options, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        let call = self.describe("Disconnect", "", options);
        self.accept(connection, call).await?;
        tokio::spawn(play(self.0.clone(), connection.clone()));
        Ok(())
    }

    async fn reconnect(&self, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        self.accept(connection, "Reconnect".to_owned()).await?;
        tokio::spawn(play(self.0.clone(), connection.clone()));
        Ok(())
    }

    async fn status(&self) -> Options {
        let script = self.0.lock().unwrap();
        let reason: Variant<'static> = script.reason.clone().into();
        let progress: Variant<'static> = script.progress.clone().into();
        let mut values = vec![
            ("Version", Variant::from("9.9.9")),
            ("State", Variant::from(script.state.clone())),
            ("Phase", Variant::from(script.phase.clone())),
            ("Reason", reason),
            ("Backend", Variant::from("proxy")),
            ("Profile", Variant::from("office")),
            ("Upstream", Variant::from("http://proxy.example:8080")),
            ("Since", Variant::from(script.since)),
            ("Progress", progress),
            ("Blocking", Variant::from(script.blocking)),
            ("Lockdown", Variant::from(script.lockdown)),
            ("Firewall", Variant::from("nftnl")),
            ("Device", Variant::from("pvpn0")),
            ("Resolvers", Variant::from(vec!["192.0.2.53"])),
            ("Health", Variant::from(script.health.clone())),
            ("Statistics", Variant::from(HashMap::from([("bytes-sent", 2048_u64)]))),
        ];
        if script.torvm {
            values.push(("Bootstrap", script.bootstrap.clone().into()));
            values.push(("Accelerator", Variant::from("tcg")));
            values.push(("AcceleratorReason", Variant::from("there is no /dev/kvm")));
            values.push(("Transport", Variant::from("obfs4")));
        }
        let owned = values.into_iter();
        owned.map(|(key, value)| (key.to_owned(), OwnedVariant::try_from(value).unwrap())).collect()
    }

    async fn plan(
        &self,
        profile: String,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<PlanStep>, Error> {
        let call = self.describe("Plan", &profile, options);
        self.accept(connection, call).await?;
        Ok(self.0.lock().unwrap().plan.clone())
    }

    async fn diagnose(
        &self,
        profile: String,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<Check>, Error> {
        let call = self.describe("Diagnose", &profile, options);
        self.accept(connection, call).await?;
        Ok(self.0.lock().unwrap().checks.clone())
    }

    async fn import_profile(
        &self,
        text: zbus::Fd<'_>,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let mut content = String::new();
        let mut file = std::fs::File::from(std::os::fd::OwnedFd::try_from(text).unwrap());
        std::io::Read::read_to_string(&mut file, &mut content).unwrap();
        self.0.lock().unwrap().received.push(content);
        let call = self.describe("ImportProfile", "", options);
        self.accept(connection, call).await?;
        Ok(zbus::ObjectPath::try_from(names::profile_path("x")).unwrap().into())
    }

    async fn remove_profile(&self, name: String, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        self.accept(connection, format!("RemoveProfile '{name}'")).await
    }

    async fn get_log(
        &self,
        count: u32,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: zbus::message::Header<'_>,
    ) -> Result<Vec<LogRecord>, Error> {
        if self.0.lock().unwrap().log_error {
            return Err(Error::NotAuthorized("you may not read the log".to_owned()));
        }
        self.accept(connection, format!("GetLog {count}")).await?;
        let (log, later) = {
            let script = self.0.lock().unwrap();
            (script.log.clone(), script.later_log.clone())
        };
        let (connection, to) = (connection.clone(), header.sender().unwrap().to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            for record in later {
                connection
                    .emit_signal(Some(to.clone()), names::MANAGER_PATH, names::MANAGER, "LogEntry", &(record,))
                    .await
                    .unwrap();
            }
        });
        Ok(log)
    }

    async fn list_flows(&self, #[zbus(connection)] connection: &Connection) -> Result<Vec<Flow>, Error> {
        self.accept(connection, "ListFlows".to_owned()).await?;
        Ok(self.0.lock().unwrap().flows.clone())
    }

    async fn set_lockdown(&self, on: bool, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        self.accept(connection, format!("SetLockdown {on}")).await?;
        let mut script = self.0.lock().unwrap();
        (script.lockdown, script.blocking) = (on, on);
        Ok(())
    }

    #[zbus(property)]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }
}

struct TorVm(Shared);

#[zbus::interface(name = "org.proxyvpn1.TorVm")]
impl TorVm {
    async fn new_identity(&self, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        accept(&self.0, connection, "NewIdentity".to_owned()).await
    }

    async fn circuits(&self, #[zbus(connection)] connection: &Connection) -> Result<Vec<Circuit>, Error> {
        accept(&self.0, connection, "Circuits".to_owned()).await?;
        Ok(self.0.lock().unwrap().circuits.clone())
    }

    async fn set_bridges(
        &self,
        profile: String,
        transport: String,
        lines: Vec<String>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        accept(&self.0, connection, format!("SetBridges '{profile}' {transport} {lines:?}")).await
    }
}

struct Profile {
    name: String,
    backend: &'static str,
    text: String,
}

#[zbus::interface(name = "org.proxyvpn1.Profile")]
impl Profile {
    #[zbus(property)]
    fn name(&self) -> String {
        self.name.clone()
    }
    #[zbus(property)]
    fn backend(&self) -> String {
        self.backend.to_owned()
    }
    #[zbus(property)]
    fn upstream(&self) -> String {
        "http://proxy.example:8080".to_owned()
    }
    #[zbus(property)]
    fn autoconnect(&self) -> bool {
        false
    }
    #[zbus(property)]
    fn origin(&self) -> String {
        "imported".to_owned()
    }
    #[zbus(property)]
    fn text(&self) -> String {
        self.text.clone()
    }
}
