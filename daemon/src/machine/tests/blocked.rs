//! How a block begins, what is tried meanwhile, and how it ends.

use super::*;

#[test]
fn a_silent_upstream_blocks_and_comes_back() {
    run(async {
        let script = Script { probe_fails: 3.into(), ..Script::default() };
        let mut rig = Rig::connected(script).await;
        rig.script.calls();
        let start = tokio::time::Instant::now();
        rig.script.fault(Fault::Upstream(failure()));
        rig.until(State::Blocked).await;
        rig.until(State::Connected).await;
        assert_eq!(rig.script.calls(), "probe probe probe probe");
        assert_eq!(start.elapsed().as_secs(), 1 + 2 + 4 + 8);
    });
}

#[test]
fn a_lost_device_blocks_before_it_is_built_anew() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        rig.script.calls();
        rig.script.failing.lock().unwrap().push_back(Phase::CreateTun);
        rig.script.fault(Fault::Broken(failure()));
        rig.until(State::Blocked).await;
        assert_eq!(rig.script.calls(), "block");
        rig.handle.view.wait_for(|view| view.state == State::Connecting).await.unwrap();
        rig.until(State::Blocked).await;
        rig.until(State::Connected).await;
        assert!(!rig.script.calls().contains("tear-down"));
    });
}

#[test]
fn a_failed_block_is_said() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        rig.script.block_fails.store(1, Ordering::SeqCst);
        rig.script.fault(Fault::Broken(failure()));
        rig.until(State::Blocked).await;
        assert!(rig.handle.view.borrow().reason.text.contains("traffic may leave unprotected"));
    });
}

#[test]
fn what_others_change_is_looked_at_in_a_block_without_a_device_too() {
    run(async {
        let mut rig = Rig::start(Script::default(), Some("{"), None);
        rig.until(State::Blocked).await;
        let item = HealthItem { code: "put-back".to_owned(), severity: "warning".to_owned(), text: String::new() };
        *rig.script.health.lock().unwrap() = vec![item];
        rig.script.fault(Fault::Health);
        let shown = |view: &View| view.health.iter().any(|item| item.code == "put-back");
        tokio::time::timeout(Duration::from_millis(900), rig.handle.view.wait_for(shown)).await.unwrap().unwrap();
    });
}

/// A rig in `blocked` without a device, with the next attempt a minute away.
async fn waiting_long() -> Rig {
    let mut rig = Rig::connected(Script::default()).await;
    *rig.script.failing.lock().unwrap() = [Phase::ProbeUpstream; 8].into();
    rig.script.fault(Fault::Broken(failure()));
    // 1 + 2 + 4 + 8 + 16 + 32 + 60 s
    tokio::time::sleep(Duration::from_secs(124)).await;
    rig.until(State::Blocked).await;
    rig.script.failing.lock().unwrap().clear();
    rig.script.calls();
    rig
}

#[test]
fn another_uplink_is_tried_at_once() {
    run(async {
        let mut rig = waiting_long().await;
        let start = tokio::time::Instant::now();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(rig.script.calls(), "", "nothing is tried before its time");
        rig.script.fault(Fault::Uplink);
        rig.until(State::Connected).await;
        assert!(start.elapsed() < Duration::from_millis(2_600), "{:?}", start.elapsed());
        assert_eq!(rig.script.calls(), format!("block {ALL_PHASES}"), "closed meanwhile");
    });
}

#[test]
fn an_uplink_that_comes_and_goes_is_tried_twice_per_second_at_most() {
    run(async {
        let rig = waiting_long().await;
        *rig.script.failing.lock().unwrap() = [Phase::ProbeUpstream; 1_000].into();
        let script = Arc::clone(&rig.script);
        let flapping = async {
            loop {
                script.fault(Fault::Uplink);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(10), flapping).await;
        let calls = rig.script.calls();
        let tries = calls.split(' ').filter(|call| *call == "probe-upstream").count();
        assert!((10..=21).contains(&tries), "{tries}");
        assert!(!calls.contains("tear-down"));
    });
}

#[test]
fn an_upstream_that_answers_over_another_uplink_ends_the_block() {
    run(async {
        let mut rig = Rig::connected(Script { probe_fails: u32::MAX.into(), ..Script::default() }).await;
        rig.script.fault(Fault::Upstream(failure()));
        rig.until(State::Blocked).await;
        // Tried after 1, 3, 7, 15 and 31 s, and next after 63 s; after another uplink it begins anew.
        tokio::time::sleep(Duration::from_secs(40)).await;
        rig.script.calls();
        rig.script.fault(Fault::Uplink);
        tokio::time::sleep(Duration::from_millis(7_500)).await;
        assert_eq!(rig.script.calls(), "probe probe probe", "at once, after 2 s and after 4 s more");
        rig.script.fault(Fault::UpstreamWorking);
        rig.until(State::Connected).await;
    });
}

#[test]
fn the_name_of_an_upstream_that_stays_away_is_looked_up_anew() {
    run(async {
        let mut rig = Rig::connected(Script { probe_fails: u32::MAX.into(), ..Script::default() }).await;
        rig.script.calls();
        rig.script.fault(Fault::Upstream(failure()));
        rig.until(State::Blocked).await;
        tokio::time::sleep(Duration::from_secs(62)).await;
        assert_eq!(rig.script.calls(), ["probe"; 5].join(" "));
        rig.until(State::Blocked).await;
        tokio::time::timeout(Duration::from_secs(120), rig.until(State::Connected)).await.unwrap();
        assert_eq!(rig.script.calls(), format!("probe block block {ALL_PHASES}"), "closed all the time");
    });
}

#[test]
fn a_block_that_failed_is_tried_again_though_nobody_knows_what_was_wanted() {
    run(async {
        let script = Script { block_fails: 2.into(), ..Script::default() };
        let mut rig = Rig::start(script, Some("{"), None);
        rig.until(State::Blocked).await;
        assert!(rig.handle.view.borrow().reason.text.contains("traffic may leave unprotected"));
        let closed = |view: &View| !view.reason.text.contains("unprotected");
        tokio::time::timeout(Duration::from_secs(60), rig.handle.view.wait_for(closed)).await.unwrap().unwrap();
        assert_eq!(rig.script.calls(), "close close close");
    });
}

#[test]
fn a_reconnect_during_a_probe_is_not_forgotten() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        rig.script.probe_hangs.store(true, Ordering::SeqCst);
        rig.script.fault(Fault::Upstream(failure()));
        rig.until(State::Blocked).await;
        rig.script.calls();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(rig.script.calls(), "probe");
        rig.reconnect().await.unwrap();
        let connected = rig.until(State::Connected);
        tokio::time::timeout(Duration::from_secs(60), connected).await.unwrap();
    });
}
