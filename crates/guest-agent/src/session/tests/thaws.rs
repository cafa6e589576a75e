//! Freezes of which nobody knows, and guests that are thawed or are not.

use super::*;

#[test]
fn a_freeze_that_comes_late_is_thawed_before_anything_else() {
    let fake = Fake::new(vec![
        script(|peer| {
            peer.sync();
            peer.request();
            peer.hold();
        }),
        script(|peer| {
            let mut thaws = 0;
            peer.serve(|command, _| match command {
                "guest-fsfreeze-thaw" => {
                    thaws += 1;
                    ok(2)
                }
                // Still frozen after the first: the client must not believe the count alone.
                "guest-fsfreeze-status" => ok(if thaws < 2 { "frozen" } else { "thawed" }),
                "guest-ping" => json!({ "return": {} }),
                other => panic!("{other}"),
            });
        }),
    ]);
    let mut session = connect(&fake);
    let error = session.freeze(&plain(), within(100)).unwrap_err();
    assert!(error.in_doubt(), "{error}");
    session.ping(within(5000)).unwrap();
    session.ping(within(5000)).unwrap();
    drop(session);
    let thaw_twice =
        ["guest-fsfreeze-thaw", "guest-fsfreeze-status", "guest-fsfreeze-thaw", "guest-fsfreeze-status"];
    let heard = fake.join();
    assert_eq!(heard[0], "guest-fsfreeze-freeze");
    assert_eq!(heard[1..5], thaw_twice);
    assert_eq!(heard[5..], ["guest-ping", "guest-ping"]);
}

#[test]
fn without_a_target_nothing_is_asked() {
    let fake = Fake::new(vec![script(|peer| peer.serve(|command, _| panic!("{command}")))]);
    let mut session = connect(&fake);
    assert_eq!(session.freeze(&coverage(&AgentInfo::default(), &[], None), within(5000)).unwrap(), 0);
    drop(session);
    assert!(fake.join().is_empty());
}

#[test]
fn a_freeze_with_an_absurd_count_is_in_doubt_and_thawed() {
    let fake = Fake::new(vec![
        script(|peer| {
            peer.serve(|_, _| ok(-5));
        }),
        script(|peer| {
            peer.serve(|command, _| match command {
                "guest-fsfreeze-thaw" => ok(0),
                "guest-fsfreeze-status" => ok("thawed"),
                _ => json!({ "return": {} }),
            });
        }),
    ]);
    let mut session = connect(&fake);
    let error = session.freeze(&plain(), within(5000)).unwrap_err();
    assert!(matches!(error, AgentError::Protocol { .. }), "{error}");
    session.ping(within(5000)).unwrap();
    drop(session);
    assert_eq!(fake.join()[1], "guest-fsfreeze-thaw");
}

#[test]
fn a_connection_lost_while_frozen_is_reopened_for_the_thaw() {
    let fake = Fake::new(vec![
        script(|peer| {
            peer.sync();
            peer.request();
            peer.answer(&json!(1));
        }),
        script(|peer| {
            peer.serve(|command, _| {
                ok(if command == "guest-fsfreeze-thaw" { json!(1) } else { json!("thawed") })
            });
        }),
    ]);
    let mut session = connect(&fake);
    assert_eq!(session.freeze(&plain(), within(5000)).unwrap(), 1);
    thread::sleep(Duration::from_millis(50)); // lets the first connection go
    assert_eq!(session.thaw(within(5000)).unwrap().count, 1);
    drop(session);
    fake.join();
}

#[test]
fn a_guest_that_stays_frozen_is_an_error_by_the_deadline() {
    let fake = Fake::new(vec![script(|peer| {
        peer.serve(|command, _| {
            ok(if command == "guest-fsfreeze-thaw" { json!(0) } else { json!("frozen") })
        });
    })]);
    let mut session = connect(&fake);
    let start = Instant::now();
    assert!(session.thaw(within(300)).is_err());
    assert!(start.elapsed() < Duration::from_millis(300) + SLACK);
    drop(session);
    assert!(fake.join().len() > 4, "it must have tried more than once");
}

/// Added up, they are more than a number holds.
#[test]
fn a_guest_that_thaws_more_than_there_can_be_is_an_error_by_the_deadline() {
    let fake = Fake::new(vec![script(|peer| {
        peer.serve(|command, _| {
            ok(if command == "guest-fsfreeze-thaw" { json!(i64::MAX) } else { json!("frozen") })
        });
    })]);
    let mut session = connect(&fake);
    assert!(matches!(session.thaw(within(400)), Err(AgentError::Timeout { .. })));
    drop(session);
    assert!(fake.join().len() > 6, "it must have tried more than twice");
}

#[test]
fn a_windows_guest_that_thawed_itself_is_confirmed_with_its_complaint() {
    let words = "couldn't hold writes: fsfreeze is limited up to 10 seconds: ";
    let fake = Fake::new(vec![script(move |peer| {
        peer.serve(|command, _| match command {
            "guest-fsfreeze-thaw" => json!({ "error": { "class": "GenericError", "desc": words } }),
            _ => ok("thawed"),
        });
    })]);
    let mut session = connect(&fake);
    let thawed = session.thaw(within(5000)).unwrap();
    assert_eq!(thawed.count, 0);
    assert!(thawed.complaint.unwrap().contains("limited up to 10 seconds"));
    drop(session);
    fake.join();
}

#[test]
fn a_thaw_that_stays_refused_hands_on_the_refusal() {
    let fake = Fake::new(vec![script(|peer| {
        peer.serve(|command, _| if command == "guest-fsfreeze-thaw" { refusal() } else { ok("frozen") });
    })]);
    let mut session = connect(&fake);
    assert!(matches!(session.thaw(within(200)), Err(AgentError::Refused { .. })));
    drop(session);
    fake.join();
}
