//! Questions that a person must answer: whoever waits for one delays nobody, and leaves nothing behind.

use std::io::{Read, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use proxyvpn_dbus::names::MANAGER_PATH;
use zbus::fdo::MonitoringProxy;
use zbus::{MatchRule, MessageStream};

use crate::world::{Options, World, call, client, manager, pipe, run};

const ASKED: &str = "Password:";
const READY: &str = "ready";
const REFUSED: &str = "too many calls wait";

/// A program of `bob` that calls `Reconnect`, and an authentication agent for it on a terminal of its own.
struct Asking {
    caller: Child,
    agent: Child,
    screen: Arc<Mutex<String>>,
}

impl Asking {
    async fn start() -> Self {
        let mut caller = bob()
            .args([
                "sh",
                "-c",
                "read go; exec busctl --system --timeout=100 --allow-interactive-authorization=yes call \
                    org.proxyvpn1 /org/proxyvpn1 org.proxyvpn1.Manager Reconnect",
            ])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The agent closes the descriptor when it is registered; then `cat` ends.
        let script = format!(
            "{{ pkttyagent --process {} --notify-fd 5 5>&1 >/dev/tty & }} | cat; echo {READY}; exec sleep 1000",
            caller.id()
        );
        let mut agent = bob()
            .args(["script", "-qefc", &script, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let screen = Arc::new(Mutex::new(String::new()));
        show(caller.stderr.take().unwrap(), &screen);
        show(agent.stdout.take().unwrap(), &screen);
        let mut go = caller.stdin.take().unwrap();
        let asking = Self { caller, agent, screen };
        asking.shows(READY).await;
        go.write_all(b"\n").unwrap();
        asking
    }

    fn screen(&self) -> String {
        self.screen.lock().unwrap().clone()
    }

    /// Waits until the terminal shows `text`.
    async fn shows(&self, text: &'static str) {
        self.shows_one_of([text]).await;
    }

    /// Waits until the terminal shows one of `texts`, and gives which.
    async fn shows_one_of<const N: usize>(&self, texts: [&'static str; N]) -> &'static str {
        for _ in 0..3000 {
            let screen = self.screen();
            if let Some(text) = texts.into_iter().find(|text| screen.contains(text)) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("none of {texts:?} is on the screen: {}", self.screen());
    }

    /// Ends the caller alone: who is asked is still there.
    fn leave(&mut self) {
        let _ = self.caller.kill();
        self.caller.wait().unwrap();
    }

    /// Ends the caller, and the terminal with all that runs on it.
    fn end(mut self) {
        self.leave();
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
    }
}

fn bob() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=bob", "--regid=bob", "--init-groups"]);
    command
}

/// Adds what comes to the screen.
fn show(mut output: impl Read + Send + 'static, screen: &Arc<Mutex<String>>) {
    let screen = Arc::clone(screen);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            screen.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
}

#[test]
#[ignore = "needs root, dbus-daemon, polkitd and pkttyagent"]
fn a_question_that_nobody_answers_delays_nobody_and_is_taken_back() {
    run("prompts::a_question_that_nobody_answers_delays_nobody_and_is_taken_back", || async {
        let world = World::new().await;
        let monitor = client("root").await;
        let rule =
            MatchRule::try_from("interface='org.freedesktop.PolicyKit1.Authority',member='CancelCheckAuthorization'")
                .unwrap();
        MonitoringProxy::new(&monitor).await.unwrap().become_monitor(&[rule], 0).await.unwrap();
        let mut cancelled = MessageStream::from(&monitor);

        let alice = client("alice").await;
        let mut asking = Asking::start().await;
        asking.shows(ASKED).await;

        // While that question is open, others read, write and change the tree of objects.
        let start = Instant::now();
        let carol = client("carol").await;
        manager(&carol, "Status", &()).await.unwrap();
        let set = (proxyvpn_dbus::names::MANAGER, "State", zbus::Variant::from("connected"));
        let error = call(&carol, MANAGER_PATH, "org.freedesktop.DBus.Properties", "Set", &set).await.unwrap_err();
        assert!(error.contains("PropertyReadOnly"), "{error}");
        let import = (pipe(crate::world::PROFILE), crate::world::options([("name", "new".into())]));
        manager(&alice, "ImportProfile", &import).await.unwrap();
        manager(&carol, "Disconnect", &(Options::new(),)).await.unwrap();
        manager(&carol, "Status", &()).await.unwrap();
        // Whoever had to wait for the question would wait for its end, which is two minutes away.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        assert_eq!(world.take_notes(), ["disconnect"]);

        // Not the agent, or polkit might end the question first by itself.
        asking.leave();
        let cancel = tokio::time::timeout(Duration::from_secs(30), cancelled.next()).await;
        assert!(cancel.is_ok_and(|message| message.is_some_and(|message| message.is_ok())), "the question stays open");
        asking.end();
        assert!(world.take_notes().is_empty(), "nobody allowed bob to reconnect");
    });
}

#[test]
#[ignore = "needs root, dbus-daemon, polkitd and pkttyagent"]
fn one_user_has_four_questions_open_at_most() {
    run("prompts::one_user_has_four_questions_open_at_most", || async {
        let _world = World::new().await;
        let mut open = Vec::new();
        for _ in 0..4 {
            let asking = Asking::start().await;
            asking.shows(ASKED).await;
            open.push(asking);
        }
        let fifth = Asking::start().await;
        fifth.shows(REFUSED).await;
        fifth.end();
        for asking in open {
            asking.end();
        }
        // A question ends a moment after who asked it.
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let again = Asking::start().await;
            let shown = again.shows_one_of([ASKED, REFUSED]).await;
            again.end();
            if shown == ASKED {
                break;
            }
            assert!(Instant::now() < end, "the room does not come back");
        }
    });
}
