//! What is different while nothing may leave without a connection.

use super::*;

#[test]
fn lockdown_asks_for_a_profile_that_has_connected() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        rig.at_rest().await;
        assert!(
            matches!(rig.lockdown(true).await, Err(Error::NeverConnected(text)) if text.contains("proxyctl connect"))
        );
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("", Lockdown::Off));
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        rig.script.calls();
        rig.lockdown(true).await.unwrap();
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("lock", Lockdown::On));
        assert!(rig.handle.view.borrow().lockdown);
        rig.lockdown(false).await.unwrap();
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("unlock", Lockdown::Off));
        assert!(!rig.handle.view.borrow().lockdown);
        assert_eq!(rig.handle.view.borrow().state, State::Connected);
    });
}

#[test]
fn under_lockdown_to_disconnect_closes() {
    run(async {
        let mut rig = Rig::locked().await;
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        assert_eq!(rig.script.calls(), format!("close {ALL_PHASES}"));
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        assert_eq!(rig.script.calls(), "close");
        assert!(rig.handle.view.borrow().reason.text.contains("lockdown is on"));
        assert_eq!(rig.intent(), Intent::Nothing);
        rig.lockdown(false).await.unwrap();
        assert_eq!(rig.script.calls(), "unlock tear-down");
    });
}

#[test]
fn under_lockdown_a_failed_first_attempt_closes_in_every_phase() {
    for phase in Phase::PROXY {
        run(async move {
            let mut rig = Rig::locked().await;
            rig.script.failing.lock().unwrap().push_back(phase);
            rig.connect().await.unwrap();
            rig.handle.view.wait_for(|view| view.reason.code == "upstream-unreachable").await.unwrap();
            rig.until(State::Disconnected).await;
            let calls = rig.script.calls();
            assert!(calls.starts_with("close ") && calls.ends_with(" close"), "{phase:?}: {calls}");
            assert!(!calls.contains("tear-down") && !calls.contains("unlock"), "{phase:?}: {calls}");
        });
    }
}

#[test]
fn a_daemon_that_starts_under_lockdown_never_opens() {
    for wanted in [None, Some("profile"), Some("{")] {
        run(async move {
            let rig = Rig::locked().await;
            match wanted {
                Some("profile") => IntentFile::new(&rig.directory).write(&profile()).unwrap(),
                Some(text) => std::fs::write(rig.directory.join("intent.json"), text).unwrap(),
                None => {}
            }
            let mut rig = rig.restart(Script::default()).await;
            let goal = match wanted {
                None => State::Disconnected,
                Some("profile") => State::Connected,
                Some(_) => State::Blocked,
            };
            rig.handle.view.wait_for(|view| view.lockdown).await.unwrap();
            rig.until(goal).await;
            let calls = rig.script.calls();
            assert!(calls.starts_with("lock close") || calls.starts_with("lock block"), "{wanted:?}: {calls}");
            assert!(!calls.contains("tear-down"), "{wanted:?}: {calls}");
        });
    }
}

#[test]
fn a_record_that_cannot_be_trusted_locks_and_says_what_helps() {
    run(async {
        let rig = Rig::start(Script::default(), None, None);
        std::fs::write(rig.directory.join("lockdown"), "{\"version\":99}").unwrap();
        let mut rig = rig.restart(Script::default()).await;
        let told = |view: &View| view.health.iter().any(|item| item.code == "lockdown-unreadable");
        rig.handle.view.wait_for(told).await.unwrap();
        rig.until(State::Disconnected).await;
        assert!(rig.handle.view.borrow().lockdown && told(&rig.handle.view.borrow()));
        assert_eq!(rig.script.calls(), "lock close");
        rig.lockdown(false).await.unwrap();
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("unlock tear-down", Lockdown::Off));
        assert!(!told(&rig.handle.view.borrow()));
    });
}

#[test]
fn a_lock_that_fails_changes_nothing() {
    run(async {
        let mut rig = Rig::locked().await;
        rig.script.lock_fails.store(1, Ordering::SeqCst);
        assert!(matches!(rig.lockdown(false).await, Err(Error::Internal(text)) if text.contains("stays on")));
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("unlock lock", Lockdown::On));
        rig.lockdown(false).await.unwrap();
        rig.script.calls();
        rig.script.lock_fails.store(1, Ordering::SeqCst);
        assert!(matches!(rig.lockdown(true).await, Err(Error::Internal(text)) if text.contains("stays off")));
        assert_eq!((rig.script.calls().as_str(), rig.recorded()), ("lock unlock", Lockdown::Off));
        assert!(!rig.handle.view.borrow().lockdown);
        rig.until(State::Disconnected).await;
    });
}

#[test]
fn a_block_that_fails_under_lockdown_is_said_and_tried_again() {
    run(async {
        let mut rig = Rig::locked().await;
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        rig.script.block_fails.store(2, Ordering::SeqCst);
        rig.disconnect().await.unwrap();
        let open = |view: &View| view.health.iter().any(|item| item.code == "lockdown-open");
        rig.handle.view.wait_for(open).await.unwrap();
        let closed = |view: &View| !open(view);
        tokio::time::timeout(Duration::from_secs(120), rig.handle.view.wait_for(closed)).await.unwrap().unwrap();
        assert_eq!(rig.handle.view.borrow().state, State::Disconnected);
    });
}

#[test]
fn a_daemon_that_ends_leaves_the_lock_and_where_there_is_none_the_block() {
    for lock_fails in [0, 1] {
        run(async move {
            let rig = Rig::locked().await;
            let mut rig = rig.restart(Script { lock_fails: lock_fails.into(), ..Script::default() }).await;
            rig.handle.view.wait_for(|view| view.lockdown).await.unwrap();
            rig.until(State::Disconnected).await;
            rig.script.calls();
            rig.shutdown.send(true).unwrap();
            (&mut rig.machine).await.unwrap();
            assert_eq!(rig.script.calls(), if lock_fails == 0 { "tear-down" } else { "close" });
            assert_eq!(rig.recorded(), Lockdown::On);
        });
    }
}

#[test]
fn lockdown_waits_while_the_network_changes() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        // A call may have started the daemon, which cleans up first.
        rig.handle.view.wait_for(|view| view.state == State::Disconnecting).await.unwrap();
        assert!(matches!(rig.lockdown(true).await, Err(Error::NeverConnected(_))));
        *rig.script.hanging.lock().unwrap() = Some(Phase::ProbeUpstream);
        rig.connect().await.unwrap();
        rig.handle.view.wait_for(|view| view.phase == "probe-upstream").await.unwrap();
        let (off, disconnected) = tokio::join!(rig.lockdown(false), rig.disconnect());
        assert!(off.is_ok() && disconnected.is_ok());
        rig.until(State::Disconnected).await;
        // As many as are held; more are told to come back.
        rig.connect().await.unwrap();
        rig.handle.view.wait_for(|view| view.phase == "probe-upstream").await.unwrap();
        let asked: Vec<_> = (0..5).map(|_| rig.ask_lockdown()).collect();
        let mut asked = futures_util::future::join_all(asked).await;
        assert!(matches!(asked.pop().unwrap().await.unwrap(), Err(Error::Busy(_))));
        rig.disconnect().await.unwrap();
        for answer in asked {
            answer.await.unwrap().unwrap();
        }
    });
}
