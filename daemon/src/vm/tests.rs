//! The virtual machine with a launcher, a QEMU and a guest that the test plays.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::time::Duration;

use proxyvpn_torvm::channel::Status;
use proxyvpn_torvm::config::GuestConfig;
use proxyvpn_torvm::launch::{Accelerator, MAX_MESSAGE, Reply, Request};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, listen, recvmsg, send, socket_with, socketpair,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::accel::{Acceleration, RECORD};
use super::sys::watch;
use super::*;
use crate::test_dir::TestDir;
use crate::tor::Password;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A plain configuration.
pub(super) fn config(password: &Password) -> GuestConfig {
    GuestConfig {
        control_password: password.hashed().unwrap(),
        tor: Default::default(),
        proxy: None,
        hosts: Default::default(),
    }
}

/// The other side of a virtual machine.
struct Qemu {
    request: Option<Request>,
    launcher: OwnedFd,
    qmp: BufReader<UnixStream>,
    channel: UnixStream,
    /// What else came.
    rest: Vec<OwnedFd>,
}

impl Qemu {
    fn reply(&self, reply: &Reply) {
        send(&self.launcher, &serde_json::to_vec(reply).unwrap(), SendFlags::NOSIGNAL).unwrap();
    }

    async fn say(&mut self, status: &Status) {
        self.channel.write_all(format!("{}\n", serde_json::to_string(status).unwrap()).as_bytes()).await.unwrap();
    }

    async fn tell(&mut self, line: &str) {
        self.qmp.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// The next command.
    async fn command(&mut self) -> String {
        // Puts the parser into its first state.
        if self.qmp.fill_buf().await.unwrap().first() == Some(&0xff) {
            self.qmp.consume(1);
        }
        let mut line = String::new();
        self.qmp.read_line(&mut line).await.unwrap();
        let command: serde_json::Value = serde_json::from_str(&line).unwrap();
        command["execute"].as_str().unwrap().to_owned()
    }

    fn ended(self, cause: &str) {
        self.reply(&Reply::Ended { cause: cause.to_owned() });
    }
}

/// A virtual machine that runs.
fn running() -> (Vm, Qemu) {
    let (launcher, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None).unwrap();
    let (qmp, its_qmp) = UnixStream::pair().unwrap();
    let (channel, its_channel) = UnixStream::pair().unwrap();
    let kept = [launcher, qmp.into_std().unwrap().into(), channel.into_std().unwrap().into()];
    let vm = Vm::adopt(Kept::new(kept)).unwrap();
    (vm, Qemu { request: None, launcher: its, qmp: BufReader::new(its_qmp), channel: its_channel, rest: vec![] })
}

/// A launcher.
struct Launcher {
    listener: AsyncFd<OwnedFd>,
    socket: PathBuf,
    dir: TestDir,
}

impl Launcher {
    fn new(name: &str) -> Self {
        let dir = image::tests::image(name);
        let socket = dir.path("socket");
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        Self { listener: watch(listener).unwrap(), socket, dir }
    }

    async fn launch(&self, accelerator: Option<Accelerator>) -> Result<(Vm, Acceleration), Error> {
        let image = Image::open(&self.dir.path("")).await?;
        let spec = Spec {
            accelerator,
            memory_mib: 256,
            config: config(&Password::generate().unwrap()),
            state: &self.dir.path("state"),
        };
        let (link, _engine) = StdStream::pair().unwrap();
        let tap = fs::File::open("/dev/null").unwrap();
        Vm::launch(&self.socket, image, spec, tap.as_fd(), link.into()).await
    }

    async fn accept(&self) -> OwnedFd {
        loop {
            let mut guard = self.listener.readable().await.unwrap();
            if let Ok(socket) = guard.try_io(|listener| Ok(accept_with(listener, FLAGS)?)) {
                return socket.unwrap();
            }
        }
    }

    async fn qemu(&self) -> Qemu {
        let launcher = watch(self.accept().await).unwrap();
        let mut fds = vec![];
        let request = loop {
            let mut guard = launcher.readable().await.unwrap();
            let received = guard.try_io(|socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut message = [0; MAX_MESSAGE];
                let read =
                    recvmsg(socket, &mut [io::IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        fds.extend(rights);
                    }
                }
                Ok(serde_json::from_slice(&message[..read.bytes]).unwrap())
            });
            if let Ok(request) = received {
                break request.unwrap();
            }
        };
        assert_eq!(fds.len(), 8);
        let mut streams = fds.drain(2..4).map(|fd| {
            let stream = StdStream::from(fd);
            stream.set_nonblocking(true).unwrap();
            UnixStream::from_std(stream).unwrap()
        });
        let (qmp, channel) = (streams.next().unwrap(), streams.next().unwrap());
        drop(streams);
        Qemu { request: Some(request), launcher: launcher.into_inner(), qmp: BufReader::new(qmp), channel, rest: fds }
    }

    /// One that starts, and whose guest reports.
    async fn good(&self) -> Qemu {
        let mut qemu = self.qemu().await;
        qemu.reply(&Reply::Started { version: "7.2.22".to_owned() });
        qemu.say(&Status::Init).await;
        qemu
    }
}

fn accelerator(qemu: &Qemu) -> Accelerator {
    qemu.request.as_ref().unwrap().accelerator
}

#[tokio::test]
async fn it_starts_with_all_that_it_needs() {
    let launcher = Launcher::new("vm-start");
    let (started, mut qemu) = tokio::join!(launcher.launch(None), launcher.good());
    let (mut vm, used) = started.unwrap();
    assert_eq!(qemu.request, Some(Request { accelerator: Accelerator::Kvm, memory_mib: 256 }));
    assert_eq!((used.accelerator, &*used.qemu), (Accelerator::Kvm, "7.2.22"));
    assert_eq!(vm.event().await, Event::Status(Status::Init), "what the proof read is still told");
    // QEMU is spoken to while events are waited for.
    let command = tokio::select! {
        command = qemu.command() => command,
        event = vm.event() => panic!("{event:?}"),
    };
    assert_eq!(command, "qmp_capabilities");
    let sizes: Vec<_> = qemu.rest[2..].iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_size).collect();
    assert_eq!(sizes[..3], [6, 9, 64 << 20], "kernel, initramfs, state disk");
    vm.set_clock().unwrap();
    qemu.say(&Status::Alive).await;
    assert_eq!(vm.event().await, Event::Status(Status::Alive));
    let mut order = [0; 64];
    let length = qemu.channel.read(&mut order).await.unwrap();
    assert!(order[..length].starts_with(b"{\"order\":\"clock\",\"unix_micros\":"));
}

#[tokio::test(start_paused = true)]
async fn without_a_launcher_or_with_a_bad_one_it_says_what_to_do() {
    let launcher = Launcher::new("vm-launcher");
    let bad = async |what: &[u8]| {
        let connection = launcher.accept().await;
        if !what.is_empty() {
            send(&connection, what, SendFlags::NOSIGNAL).unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let (gone, ()) = tokio::join!(launcher.launch(Some(Accelerator::Tcg)), bad(b""));
    assert!(matches!(gone, Err(Error::LauncherGone | Error::Launcher(_))), "{gone:?}");
    let (failed, ()) = tokio::join!(
        launcher.launch(Some(Accelerator::Tcg)),
        bad(br#"{"failed":{"cause":"QEMU 5.0 is too\u001b old"}}"#)
    );
    assert_eq!(failed.unwrap_err().to_string(), "QEMU can't be started: QEMU 5.0 is too  old");
    let (garbage, ()) = tokio::join!(launcher.launch(Some(Accelerator::Tcg)), bad(b"{}"));
    assert!(matches!(garbage, Err(Error::Launcher(_))), "{garbage:?}");
    let (long, ()) = tokio::join!(launcher.launch(Some(Accelerator::Tcg)), bad(&[b' '; MAX_MESSAGE + 1]));
    assert!(matches!(long, Err(Error::Launcher(_))), "{long:?}");
    let silent = launcher.launch(Some(Accelerator::Tcg)).await;
    assert!(matches!(silent, Err(Error::LauncherSilent { .. })), "{silent:?}");
    // What nobody took from it has the state disk, too.
    drop(launcher.accept().await);
    fs::remove_file(&launcher.socket).unwrap();
    let none = launcher.launch(Some(Accelerator::Tcg)).await.unwrap_err().to_string();
    assert!(none.contains("proxyvpn-qemu.socket"), "{none}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_silent_under_kvm_is_emulated_and_that_is_remembered() {
    let launcher = Launcher::new("vm-kvm");
    let (started, qemu) = tokio::join!(launcher.launch(None), async {
        let mut first = launcher.qemu().await;
        assert_eq!(accelerator(&first), Accelerator::Kvm);
        first.reply(&Reply::Started { version: "7.2.22".to_owned() });
        while first.command().await != "quit" {}
        first.ended("it was told to quit");
        let second = launcher.good().await;
        assert_eq!(accelerator(&second), Accelerator::Tcg);
        second
    });
    let reason = started.unwrap().1.reason;
    assert!(reason.contains("did not report within 5 s"), "{reason}");
    drop(qemu);

    let (started, qemu) = tokio::join!(launcher.launch(None), launcher.good());
    assert_eq!(accelerator(&qemu), Accelerator::Tcg, "it is not tried again");
    assert!(started.unwrap().1.reason.contains("before"));
    drop(qemu);

    let (kvm, ()) = tokio::join!(launcher.launch(Some(Accelerator::Kvm)), async {
        let qemu = launcher.qemu().await;
        qemu.reply(&Reply::Started { version: "7.2.22".to_owned() });
        qemu.ended("an error of KVM");
    });
    assert!(kvm.unwrap_err().to_string().contains("an error of KVM"));

    // With another QEMU it is worth a try.
    let (started, _qemu) = tokio::join!(launcher.launch(None), async {
        let qemu = launcher.qemu().await;
        qemu.reply(&Reply::Started { version: "8.0.0".to_owned() });
        qemu
    });
    started.unwrap();
    assert!(!launcher.dir.path("state").join(RECORD).exists());
}

#[tokio::test]
async fn where_kvm_is_refused_it_is_emulated_and_that_is_not_remembered() {
    let launcher = Launcher::new("vm-refused");
    let (started, qemu) = tokio::join!(launcher.launch(None), async {
        launcher.qemu().await.reply(&Reply::Failed { cause: "there is no /dev/kvm".to_owned() });
        launcher.good().await
    });
    assert_eq!(accelerator(&qemu), Accelerator::Tcg);
    assert!(started.unwrap().1.reason.contains("no /dev/kvm"));
    assert!(!launcher.dir.path("state").join(RECORD).exists());
}

#[tokio::test]
async fn a_start_that_is_dropped_ends_qemu() {
    let launcher = Launcher::new("vm-dropped");
    let starting = async { drop(timeout(Duration::from_millis(300), launcher.launch(Some(Accelerator::Kvm))).await) };
    let ((), qemu) = tokio::join!(starting, launcher.qemu());
    assert_eq!(rustix::net::recv(&qemu.launcher, &mut [0; 1], RecvFlags::empty()).unwrap().1, 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_is_hung_whether_qemu_answers_or_not() {
    let (mut vm, mut qemu) = running();
    qemu.say(&Status::Alive).await;
    assert_eq!(vm.event().await, Event::Status(Status::Alive));
    let start = Instant::now();
    assert_eq!(
        vm.event().await,
        Event::Hung("the guest has said nothing for 10 s; QEMU does not answer either".into())
    );
    assert_eq!(start.elapsed().as_secs(), 12);

    let answering = tokio::spawn(async move {
        while qemu.command().await != "query-status" {}
        // The first was for the time before.
        while qemu.command().await != "query-status" {}
        qemu.tell(r#"{"return":{"status":"paused","running":false},"id":3}"#).await;
        qemu
    });
    assert_eq!(
        vm.event().await,
        Event::Hung("the guest has said nothing for 10 s; QEMU answers that it is paused".into())
    );
    let mut qemu = answering.await.unwrap();
    qemu.say(&Status::Alive).await;
    assert_eq!(vm.event().await, Event::Status(Status::Alive), "it can come back");
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_dropped_lose_nothing_and_put_nothing_off() {
    let (mut vm, mut qemu) = running();
    qemu.say(&Status::Alive).await;
    assert_eq!(vm.event().await, Event::Status(Status::Alive));
    let start = Instant::now();
    let hung = loop {
        if let Ok(event) = timeout(Duration::from_millis(700), vm.event()).await {
            break event;
        }
    };
    assert!(matches!(hung, Event::Hung(_)));
    assert_eq!(start.elapsed().as_secs(), 12);
}

#[tokio::test]
async fn its_end_is_told_once_with_its_cause() {
    async fn play(play: impl AsyncFnOnce(Qemu)) -> Event {
        let (mut vm, qemu) = running();
        play(qemu).await;
        let event = loop {
            match vm.event().await {
                Event::Status(_) => {}
                other => break other,
            }
        };
        assert!(timeout(Duration::from_millis(20), vm.event()).await.is_err() || matches!(event, Event::Hung(_)));
        event
    }
    let ended = |cause: &str| Event::Ended(cause.to_owned());
    assert_eq!(play(async |qemu: Qemu| qemu.ended("signal 9")).await, ended("signal 9"));
    assert_eq!(play(async |qemu: Qemu| drop(qemu)).await, ended("QEMU's launcher ended without a word"));
    let off = async |mut qemu: Qemu| {
        qemu.say(&Status::Off { cause: "tor has ended".to_owned() }).await;
        qemu.tell(r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#).await;
        qemu.ended("status 0");
    };
    assert_eq!(play(off).await, ended("the guest powered off: tor has ended"));
    let panic = async |mut qemu: Qemu| {
        qemu.tell(r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}"#).await;
        qemu.ended("status 0; Kernel panic");
    };
    let cause = "the guest started anew, as after a panic of its kernel; status 0; Kernel panic";
    assert_eq!(play(panic).await, ended(cause));
    let stopped = async |mut qemu: Qemu| qemu.tell(r#"{"event":"STOP"}"#).await;
    assert_eq!(play(stopped).await, Event::Hung("QEMU has stopped the guest".into()));
}

#[tokio::test(start_paused = true)]
async fn a_qemu_whose_launcher_says_nothing_is_gone_when_its_sockets_are() {
    let (mut vm, qemu) = running();
    let Qemu { launcher: _launcher, qmp, channel, .. } = qemu;
    drop((qmp, channel));
    assert_eq!(vm.event().await, Event::Ended("QEMU has closed its connections".into()));
}

#[tokio::test(start_paused = true)]
async fn powering_down_tells_a_clean_end_from_a_forced_one() {
    let (vm, mut qemu) = running();
    let (down, ()) = tokio::join!(vm.power_down(Duration::from_secs(5)), async move {
        while qemu.command().await != "system_powerdown" {}
        qemu.say(&Status::Off { cause: "power button".to_owned() }).await;
        qemu.ended("status 0");
    });
    assert_eq!(down, PoweredDown::Clean);

    let (vm, qemu) = running();
    let (down, ()) = tokio::join!(vm.power_down(Duration::from_secs(5)), async { qemu.ended("signal 9") });
    assert_eq!(down, PoweredDown::Forced("signal 9".into()));

    let (vm, mut qemu) = running();
    let start = Instant::now();
    let (down, ()) = tokio::join!(vm.power_down(Duration::from_secs(5)), async {
        while qemu.command().await != "quit" {}
        // Nothing moves it: the launcher must.
        let launcher = watch(qemu.launcher.try_clone().unwrap()).unwrap();
        drop(launcher.readable().await.unwrap());
        assert_eq!(rustix::net::recv(&qemu.launcher, &mut [0; 1], RecvFlags::empty()).unwrap().1, 0);
        drop(qemu);
    });
    assert_eq!(down, PoweredDown::Forced("the guest did not power off within 5 s".into()));
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_later_process_goes_on_with_it() {
    let (vm, mut qemu) = running();
    let copies = vm.kept().map(|(_, fd)| fd.try_clone_to_owned().unwrap());
    drop(vm);
    // Half lines, both ways of the streams, and one that waits whole.
    qemu.channel.write_all(b"{\"stat").await.unwrap();
    let mut vm = Vm::adopt(Kept::new(copies)).unwrap();
    qemu.channel.write_all(b"us\":\"tor\"}\n").await.unwrap();
    qemu.say(&Status::Alive).await;
    let first = vm.event().await;
    assert!(matches!(first, Event::Status(Status::Tor | Status::Alive)), "{first:?}");

    let copies = vm.kept().map(|(_, fd)| fd.try_clone_to_owned().unwrap());
    drop(vm);
    qemu.ended("signal 9");
    assert!(Vm::adopt(Kept::new(copies)).is_none(), "it has ended meanwhile");

    let (vm, qemu) = running();
    let copies = vm.kept().map(|(_, fd)| fd.try_clone_to_owned().unwrap());
    drop(vm);
    let Qemu { launcher: _launcher, qmp, .. } = qemu;
    drop(qmp);
    assert!(Vm::adopt(Kept::new(copies)).is_none(), "and its end was told to an earlier process");
}
