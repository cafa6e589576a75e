//! Every fault, and every pair of faults, at every call of every port, under every policy.

use super::super::{Cut, Freezer, Held};
use super::faults::{Call, Fault};
use super::world::{Kind, Overlay, World};
use crate::{FreezeOwner, FreezePolicy, Grade, SnapshotRecord};
use std::sync::Arc;
use std::time::Duration;

/// How the caller goes on after `prepare`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ending {
    AtOnce,
    /// Released after 11 s: longer than a freeze may last.
    Late,
    Abort,
    Drop,
}

/// What an earlier run of the daemon left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Before {
    Nothing,
    Record,
    RecordAndFrozenGuest,
}

#[derive(Clone, Copy, Debug)]
struct Scenario {
    policy: FreezePolicy,
    owner: FreezeOwner,
    has_agent: bool,
    kind: Kind,
    before: Before,
    ending: Ending,
}

impl Scenario {
    fn asks_agent(self) -> bool {
        self.has_agent && self.owner == FreezeOwner::Frazil && self.policy != FreezePolicy::Never
    }

    /// Cuts, judges what is left, lets the collector finish, and judges again. Gives the trace of the whole.
    fn run(self, faults: &[(usize, Fault)]) -> Vec<Call> {
        let world = World::new(self.kind, faults, format_args!("{self:?} {faults:?}"));
        {
            let mut state = world.state();
            state.debt = self.before != Before::Nothing;
            state.frozen = (self.before == Before::RecordAndFrozenGuest).then(|| state.start);
        }
        let freezer = world.freezer();
        let ports = world.ports(self.has_agent.then(|| Arc::clone(&freezer)));
        let cut = Cut::new(World::plan(self.policy, self.owner), ports);
        let layers = Box::new(world.clone());
        let result = match self.ending {
            Ending::AtOnce => cut.take(layers).map(Some),
            Ending::Late => cut.prepare(layers).and_then(|held| {
                world.pass(Duration::from_secs(11));
                held.release().map(Some)
            }),
            Ending::Abort => cut.prepare(layers).and_then(|held| held.abort("lease").map(|()| None)),
            Ending::Drop => cut.prepare(layers).map(|held: Held| drop(held)).map(|()| None),
        };
        self.judge(&world, &freezer, &result);
        finish(&world, freezer);
        world.state().trace.clone()
    }

    fn judge(self, world: &World, freezer: &Freezer, result: &block::Result<Option<SnapshotRecord>>) {
        let is_owed = freezer.is_owed();
        let state = world.state();
        if state.dead.get() {
            return;
        }
        state.must(!state.closed, "the gates are open at the end");
        state.must(!state.may_freeze() || is_owed, "the guest is thawed, or its thaw is owed");
        if !self.asks_agent() {
            state.must(!state.trace.iter().any(|call| call.is_guest()), "the agent is left alone");
        }
        let pivots = state.trace.contains(&Call::Pivot);
        let undoes = state.trace.contains(&Call::UndoLayers);
        let prepares = state.trace.contains(&Call::Close) || undoes || pivots;
        state.must(pivots == (state.overlay == Overlay::Active), "after the pivot the snapshot stands");
        state.must(!prepares || undoes != pivots, "the overlays are undone if and only if there is no pivot");
        let Ok(Some(record)) = result else {
            state.must(!pivots, "a cut fails only before the pivot");
            return;
        };
        state.must(pivots, "a snapshot has a pivot");
        let is_clean = record.grade == Grade::Filesystem;
        let honest = !is_clean || state.clean_at_pivot == Some(true);
        state.must(honest, "a clean snapshot was frozen at the cut");
        state.must(is_clean || !record.reason.is_empty(), "a crash has its reason");
        if self.policy == FreezePolicy::Require && !is_clean {
            // Known only after the pivot: the count of the thaw, its loss, or a pivot that took 10 s.
            let words = ["thawed", "not confirmed", "had lasted"];
            state.must(words.iter().any(|word| record.reason.contains(word)), "require is kept");
        }
        let at = |call| state.trace.iter().rposition(|made| *made == call);
        let in_order = at(Call::Open) < at(Call::Seal) && at(Call::Pivot) < at(Call::Open);
        state.must(in_order, "pivot, open, seal");
        let (thaw, seal) = (at(Call::Freeze).and(at(Call::Status)), at(Call::Seal));
        state.must(thaw < seal, "the guest is thawed before the slow sync");
    }
}

/// Whatever happened, also to the collector, the guest ends thawed and nothing stays owed.
fn finish(world: &World, mut freezer: Arc<Freezer>) {
    for _try in 0..20 {
        if world.state().dead.get() {
            world.restart();
            freezer = world.freezer();
        }
        if freezer.collect().is_none() && !world.state().dead.get() {
            let is_owed = freezer.is_owed();
            let state = world.state();
            state.must(!state.may_freeze() && !state.debt && !is_owed, "all is paid");
            return;
        }
    }
    world.state().must(false, "the collector comes to an end");
}

fn scenarios(endings: &[Ending], befores: &[Before]) -> Vec<Scenario> {
    use FreezeOwner::{External, Frazil};
    use FreezePolicy::{Never, Prefer, Require};
    let ways = [
        (Require, Frazil, true),
        (Prefer, Frazil, true),
        (Never, Frazil, true),
        (Require, Frazil, false),
        (Prefer, Frazil, false),
        (Require, External, true),
        (Prefer, External, true),
        (Never, External, true),
        (Require, FreezeOwner::None, true),
        (Prefer, FreezeOwner::None, true),
        (Never, FreezeOwner::None, true),
    ];
    let mut all = Vec::new();
    for (policy, owner, has_agent) in ways {
        for kind in [Kind::Linux, Kind::LinuxWithVfat, Kind::Windows] {
            for &before in befores {
                for &ending in endings {
                    all.push(Scenario { policy, owner, has_agent, kind, before, ending });
                }
            }
        }
    }
    all
}

#[test]
fn any_single_fault_at_any_call_keeps_the_invariants() {
    let endings = [Ending::AtOnce, Ending::Late, Ending::Abort, Ending::Drop];
    let befores = [Before::Nothing, Before::Record, Before::RecordAndFrozenGuest];
    for scenario in scenarios(&endings, &befores) {
        for (at, call) in scenario.run(&[]).iter().enumerate() {
            for fault in call.faults() {
                scenario.run(&[(at, *fault)]);
            }
        }
    }
}

/// The second fault may hit a call that only the first one led to: an undo, a retry, the collector.
#[test]
fn any_two_faults_at_any_calls_keep_the_invariants() {
    let mut runs = 0_u32;
    for scenario in
        scenarios(&[Ending::AtOnce, Ending::Late, Ending::Abort], &[Before::Nothing, Before::Record])
    {
        for (at, call) in scenario.run(&[]).iter().enumerate() {
            for fault in call.faults() {
                for (then, call) in scenario.run(&[(at, *fault)]).iter().enumerate().skip(at + 1) {
                    for second in call.faults() {
                        scenario.run(&[(at, *fault), (then, *second)]);
                        runs += 1;
                    }
                }
            }
        }
    }
    assert!(runs > 50_000, "only {runs} pairs: the enumeration is broken");
}

#[test]
fn without_faults_the_steps_come_in_order() {
    use Call::*;
    let scenario = Scenario {
        policy: FreezePolicy::Require,
        owner: FreezeOwner::Frazil,
        has_agent: true,
        kind: Kind::Linux,
        before: Before::Nothing,
        ending: Ending::AtOnce,
    };
    let before_pivot = [Prepare, Connect, PreSync, Coverage, RecordDebt, Freeze, Close, Drain];
    let after = [Pivot, Open, Thaw, Status, ClearDebt, Record, Seal, Record];
    assert_eq!(scenario.run(&[]), [&before_pivot[..], &after[..]].concat());
    let undone = [Open, Thaw, Status, ClearDebt, UndoLayers];
    let aborted = Scenario { ending: Ending::Abort, ..scenario };
    assert_eq!(aborted.run(&[]), [&before_pivot[..], &undone[..]].concat());
}
