//! A real virtual machine, through the real launcher: it starts, is watched, outlives its daemon, and ends in each way there is.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test vm -- --ignored`, in namespaces of its own
//! as scripts/test-privileged.sh makes them. The image is in `target/torvm-image`, as scripts/test-torvm.sh
//! makes it, or in the folder that `PROXYVPN_TORVM_IMAGE` names.
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod lab;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxyvpn_torvm::channel::{Disk, Status};
use proxyvpn_torvm::launch::Accelerator;
use proxyvpn_torvm::link::{CONTROL_PORT, GUEST};
use proxyvpnd::tor::{Control, Password};
use proxyvpnd::vm::{Event, PoweredDown, Vm};
use tokio::time::timeout;

use lab::Lab;

/// The events up to the one that `last` is.
async fn until(vm: &mut Vm, last: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut events = vec![];
    let waiting = timeout(Duration::from_secs(90), async {
        loop {
            let event = vm.event().await;
            events.push(event);
            if events.last().is_some_and(&last) {
                return;
            }
            assert!(!matches!(events.last(), Some(Event::Ended(_))), "{events:?}");
        }
    });
    assert!(waiting.await.is_ok(), "{events:?}");
    events
}

fn alive(event: &Event) -> bool {
    *event == Event::Status(Status::Alive)
}

fn hung(event: &Event) -> bool {
    matches!(event, Event::Hung(_))
}

fn ended(event: &Event) -> bool {
    matches!(event, Event::Ended(_))
}

#[tokio::test]
#[ignore = "needs root, QEMU and an image, and makes network namespaces"]
async fn a_virtual_machine_from_its_start_to_its_end() {
    let lab = Lab::new();
    let password = Password::generate().unwrap();
    let (mut vm, first) = lab.launch(None, &password).await.unwrap();
    // Whether KVM works is the machine's affair.
    println!("{first:?}");
    assert!(first.reason.contains("KVM") && !first.qemu.is_empty(), "{first:?}");
    let events = until(&mut vm, alive).await;
    for status in [Status::Init, Status::Network, Status::State { disk: Disk::Made }, Status::Tor] {
        assert!(events.contains(&Event::Status(status.clone())), "{status:?} in {events:?}");
    }
    vm.set_clock().unwrap();

    let address = SocketAddr::from((GUEST, CONTROL_PORT));
    let mut control = Control::connect(address, &password).await.unwrap();
    assert!(control.bootstrap().await.unwrap().percent < 100);
    drop(control);

    // Another daemon goes on with it, in the middle of a line to QEMU and to the guest.
    let mut vm = lab::hand_over(vm).expect("it runs");
    until(&mut vm, alive).await;

    lab::signal("STOP");
    let start = Instant::now();
    let events = until(&mut vm, hung).await;
    let Some(Event::Hung(cause)) = events.last() else { unreachable!() };
    assert!(cause.ends_with("QEMU does not answer either"), "{cause}");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    lab::signal("CONT");
    until(&mut vm, alive).await;

    let start = Instant::now();
    assert_eq!(vm.power_down(Duration::from_secs(10)).await, PoweredDown::Clean);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    lab.check_disk();
    lab::gone().await;

    // The same disk, an answer about KVM that is known, and an end by violence.
    let start = Instant::now();
    let (mut vm, used) = lab.launch(None, &password).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(used.accelerator, first.accelerator);
    let events = until(&mut vm, alive).await;
    assert!(events.contains(&Event::Status(Status::State { disk: Disk::Kept })), "{events:?}");
    let kept = lab::copies(&vm);
    lab::signal("KILL");
    let events = until(&mut vm, ended).await;
    let Some(Event::Ended(cause)) = events.last() else { unreachable!() };
    assert!(cause.contains("signal 9"), "{cause}");
    drop(vm);
    assert!(Vm::adopt(kept).is_none(), "there is nothing to go on with");
}

#[tokio::test]
#[ignore = "needs root, QEMU and an image, and makes network namespaces"]
async fn one_that_does_not_power_off_is_ended() {
    let lab = Lab::new();
    let (mut vm, _) = lab.launch(Some(Accelerator::Tcg), &Password::generate().unwrap()).await.unwrap();
    until(&mut vm, alive).await;
    // As with copies in the service manager's store: closing ours alone would end nothing.
    let _kept = lab::copies(&vm);
    lab::signal("STOP");
    let down = vm.power_down(Duration::from_secs(1)).await;
    assert!(matches!(down, PoweredDown::Forced(_)), "{down:?}");
    lab::gone().await;
}

#[tokio::test]
#[ignore = "needs root, QEMU and an image, and makes network namespaces"]
async fn one_that_nobody_holds_ends() {
    let lab = Lab::new();
    let (vm, _) = lab.launch(Some(Accelerator::Tcg), &Password::generate().unwrap()).await.unwrap();
    assert!(lab::qemu().is_some());
    drop(vm);
    lab::gone().await;
}
