//! Whatever fails around a freeze, the guest goes on, and the snapshot's grade says what happened.

use std::thread;
use std::time::Duration;

use frazil_integration::{FileSystem, Result, Rig, Scratch};

const DISKS: [(&str, FileSystem); 1] = [("vda", FileSystem::Ext4)];
/// Beyond the daemon's deadlines for a freeze and a thaw, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(40);

#[test]
fn without_an_agent_the_policy_decides() -> Result<()> {
    Scratch::with("no-agent", |scratch| {
        let mut rig = Rig::start_without_agent(scratch, &DISKS)?;
        assert!(rig.daemon.snapshot("required", "require").is_err());
        rig.wait_until_all_write(RECOVERY)?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("preferred", "prefer")?;
        assert_eq!(snapshot.grade, "crash");
        assert!(snapshot.reason.contains("agent"), "{}", snapshot.reason);
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}

// The hook runs before the agent freezes, and holds it there until long after the daemon has given up; then the agent
// freezes after all. Nobody would thaw it again, but for the daemon.
#[test]
fn a_freeze_that_comes_after_its_deadline_is_undone() -> Result<()> {
    Scratch::with("late-freeze", |scratch| {
        let mut rig = Rig::start_without_agent(scratch, &DISKS)?;
        rig.guest.start_agent_with_hook("[ \"$1\" != freeze ] || sleep 15; echo \"$1\" >>/run/hook.log")?;
        let snapshot = rig.daemon.snapshot("one", "prefer")?;
        assert_eq!(snapshot.grade, "crash", "{}", snapshot.reason);
        assert!(
            rig.guest.try_run("cat /run/hook.log 2>/dev/null", Duration::from_secs(10))?.0.is_empty(),
            "too early"
        );
        // The thaw that is owed is confirmed only once the agent has left its hook.
        thread::sleep(Duration::from_secs(8));
        rig.wait_until_all_write(RECOVERY)?;
        let said = rig.guest.run("cat /run/hook.log")?;
        assert!(said.contains("thaw"), "the agent ran its hook for: {said}");
        rig.finish()
    })
}

#[test]
fn an_agent_that_has_stopped_does_not_hold_the_guest() -> Result<()> {
    Scratch::with("stopped-agent", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.guest.run("kill -STOP $(cat /run/qemu-ga.pid)")?;
        assert!(rig.daemon.snapshot("required", "require").is_err());
        let snapshot = rig.daemon.snapshot("preferred", "prefer")?;
        assert_eq!(snapshot.grade, "crash", "{}", snapshot.reason);
        rig.guest.run("kill -CONT $(cat /run/qemu-ga.pid)")?;
        rig.wait_until_all_write(RECOVERY)?;
        // What was left in its socket must not confuse it later.
        let snapshot = rig.daemon.snapshot("after", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.wait_until_all_write(RECOVERY)?;
        rig.finish()
    })
}

// A new agent finds in its state folder that the guest is frozen, and can thaw it.
#[test]
fn an_agent_killed_between_freeze_and_thaw_is_asked_again_when_it_is_back() -> Result<()> {
    Scratch::with("killed-agent", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.daemon.prepare("one", 20)?;
        rig.guest.kill_agent()?;
        let snapshot = rig.daemon.release("one")?;
        assert_eq!(snapshot.grade, "crash", "{}", snapshot.reason);
        rig.guest.start_agent()?;
        rig.wait_until_all_write(RECOVERY)?;
        rig.finish()
    })
}

#[test]
fn a_daemon_killed_between_freeze_and_thaw_thaws_the_guest_when_it_is_back() -> Result<()> {
    Scratch::with("killed-daemon", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.daemon.prepare("one", 30)?;
        rig.daemon.kill()?;
        rig.daemon.restart()?;
        rig.wait_until_all_write(RECOVERY)?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("two", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}

#[test]
fn a_lease_that_ends_lets_the_guest_go_on() -> Result<()> {
    Scratch::with("lease", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.daemon.prepare("one", 2)?;
        rig.wait_until_all_write(RECOVERY)?;
        assert!(rig.daemon.release("one").is_err());
        rig.finish()
    })
}
