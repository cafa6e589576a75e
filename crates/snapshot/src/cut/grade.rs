//! How sure it is that the file systems are clean in a snapshot: the one place that decides.

use std::time::Duration;

use crate::{FreezeOwner, FreezePolicy, Grade, millis};

use super::ports::Coverage;

/// How the freeze went.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FreezeOutcome {
    /// The agent was not to be asked.
    NotAsked,
    /// It was to be asked, and there is no freeze.
    NotFrozen {
        /// Why.
        reason: String,
    },
    /// The agent says that it froze.
    Frozen {
        /// So many.
        count: u64,
        /// Of these.
        coverage: Coverage,
    },
}

/// How the thaw went.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ThawOutcome {
    /// The agent says that it thawed so many, and that nothing is frozen.
    Thawed {
        /// So many.
        count: u64,
    },
    /// It is owed.
    Unconfirmed {
        /// Why.
        reason: String,
    },
}

/// A freeze that was held for longer than the guest may keep it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Overrun {
    /// From the freeze command to the pivot.
    pub held: Duration,
    /// What was allowed.
    pub limit: Duration,
}

/// Grades a cut, and says why in words.
///
/// Without `thaw` it is the grade that the cut would have if its thaw went well: what policy `require` asks before the
/// pivot. All doubt leads to `crash`.
pub fn grade(
    policy: FreezePolicy,
    owner: FreezeOwner,
    freeze: &FreezeOutcome,
    thaw: Option<&ThawOutcome>,
    overrun: Option<Overrun>,
) -> (Grade, String) {
    match doubt(policy, owner, freeze, thaw, overrun) {
        Ok(reason) => (Grade::Filesystem, reason),
        Err(reason) => (Grade::Crash, reason),
    }
}

/// `Err` is why the file systems may not be clean, `Ok` why they are.
fn doubt(
    policy: FreezePolicy,
    owner: FreezeOwner,
    freeze: &FreezeOutcome,
    thaw: Option<&ThawOutcome>,
    overrun: Option<Overrun>,
) -> Result<String, String> {
    match (owner, policy) {
        (FreezeOwner::External, _) => {
            return Err("a freeze was left to the caller, and was not verified".to_owned());
        }
        (FreezeOwner::None, _) => return Err("nobody is to freeze this guest".to_owned()),
        (FreezeOwner::Frazil, FreezePolicy::Never) => return Err("no freeze was wanted".to_owned()),
        (FreezeOwner::Frazil, FreezePolicy::Require | FreezePolicy::Prefer) => {}
    }
    let (frozen, coverage) = match freeze {
        FreezeOutcome::NotAsked => return Err("the guest agent was not asked".to_owned()),
        FreezeOutcome::NotFrozen { reason } => return Err(format!("not frozen: {reason}")),
        FreezeOutcome::Frozen { count, coverage } => (*count, coverage),
    };
    let expected = coverage.mounts.len() as u64;
    if expected == 0 {
        return Err("the agent names no mounted file system on these disks".to_owned());
    }
    if frozen != expected {
        return Err(miscount(frozen, coverage));
    }
    if let Some(Overrun { held, limit }) = overrun {
        let (held, limit) = (millis(held), millis(limit));
        return Err(format!(
            "the freeze had lasted {held:.0} ms at the cut; a guest may end it after {limit:.0} ms"
        ));
    }
    match thaw {
        Some(ThawOutcome::Unconfirmed { reason }) => {
            Err(format!("the thaw was not confirmed, so the freeze may have ended before the cut: {reason}"))
        }
        Some(ThawOutcome::Thawed { count }) if *count != frozen => Err(format!(
            "{frozen} file systems were frozen and {count} thawed, so others may have been thawed before the cut"
        )),
        Some(ThawOutcome::Thawed { .. }) | None => {
            Ok(format!("all {expected} mounted file systems were frozen ({})", list(&coverage.mounts)))
        }
    }
}

/// Another count than that of the mounted file systems, and who may have made the difference.
fn miscount(frozen: u64, coverage: &Coverage) -> String {
    let Coverage { mounts, unfreezable } = coverage;
    let (expected, all) = (mounts.len(), list(mounts));
    if frozen > expected as u64 {
        return format!(
            "the agent froze {frozen} file systems but named {expected} before ({all}): mounts changed"
        );
    }
    let why = match unfreezable.is_empty() {
        true => format!("one of {all} was unmounted, mounted over, or frozen by somebody else"),
        false => format!("no freeze support is known for {}", list(unfreezable)),
    };
    format!("the agent froze {frozen} of {expected} mounted file systems; {why}")
}

/// `a, b and 3 more`: a guest can mount any number.
fn list(names: &[String]) -> String {
    const NAMED: usize = 5;
    let named = names.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FreezeOwner::{External, Frazil};
    use FreezePolicy::{Never, Prefer, Require};

    fn frozen(count: u64) -> FreezeOutcome {
        FreezeOutcome::Frozen {
            count,
            coverage: Coverage { mounts: vec!["/".into(), "/srv".into()], unfreezable: Vec::new() },
        }
    }

    fn nothing() -> FreezeOutcome {
        FreezeOutcome::Frozen { count: 0, coverage: Coverage::default() }
    }

    fn thawed(count: u64) -> Option<ThawOutcome> {
        Some(ThawOutcome::Thawed { count })
    }

    #[test]
    fn every_doubt_is_told_and_makes_it_a_crash() {
        let absent = || FreezeOutcome::NotFrozen { reason: "no agent".into() };
        let owed = || Some(ThawOutcome::Unconfirmed { reason: "lost".into() });
        let late = Some(Overrun { held: Duration::from_secs(11), limit: Duration::from_secs(10) });
        let table = [
            (Prefer, External, FreezeOutcome::NotAsked, None, None, "left to the caller"),
            (Require, External, FreezeOutcome::NotAsked, None, None, "left to the caller"),
            (Prefer, FreezeOwner::None, FreezeOutcome::NotAsked, None, None, "nobody"),
            (Never, Frazil, FreezeOutcome::NotAsked, None, None, "no freeze was wanted"),
            // A freeze that was not to be is not believed either.
            (Never, Frazil, frozen(2), thawed(2), None, "no freeze was wanted"),
            (Prefer, Frazil, FreezeOutcome::NotAsked, None, None, "was not asked"),
            (Prefer, Frazil, absent(), None, None, "not frozen: no agent"),
            (Require, Frazil, absent(), None, None, "not frozen: no agent"),
            (Prefer, Frazil, frozen(1), thawed(1), None, "froze 1 of 2 mounted file systems; one of /, /srv"),
            (Prefer, Frazil, frozen(3), thawed(3), None, "froze 3 file systems but named 2"),
            (Prefer, Frazil, nothing(), thawed(0), None, "names no mounted file system"),
            (Prefer, Frazil, frozen(2), thawed(2), late, "lasted 11000 ms"),
            (Prefer, Frazil, frozen(2), thawed(0), None, "2 file systems were frozen and 0 thawed"),
            (Require, Frazil, frozen(2), thawed(3), None, "and 3 thawed"),
            (Require, Frazil, frozen(2), owed(), None, "not confirmed"),
        ];
        for (policy, owner, freeze, thaw, overrun, words) in table {
            let (grade, reason) = grade(policy, owner, &freeze, thaw.as_ref(), overrun);
            assert_eq!(grade, Grade::Crash, "{reason}");
            assert!(reason.contains(words), "{reason} lacks: {words}");
        }
    }

    #[test]
    fn a_whole_freeze_held_over_the_cut_is_clean() {
        for policy in [Require, Prefer] {
            for thaw in [None, thawed(2)] {
                let (grade, reason) = grade(policy, Frazil, &frozen(2), thaw.as_ref(), None);
                assert_eq!(grade, Grade::Filesystem);
                assert_eq!(reason, "all 2 mounted file systems were frozen (/, /srv)");
            }
        }
    }

    #[test]
    fn who_can_not_be_frozen_is_named_and_long_lists_are_cut() {
        let mounts: Vec<String> = (0..7).map(|n| format!("/{n}")).collect();
        let coverage = Coverage { mounts, unfreezable: vec!["/boot/efi (vfat, vda1)".into()] };
        let freeze = FreezeOutcome::Frozen { count: 6, coverage: coverage.clone() };
        let (_, reason) = grade(Prefer, Frazil, &freeze, None, None);
        assert_eq!(
            reason,
            "the agent froze 6 of 7 mounted file systems; no freeze support is known for /boot/efi (vfat, vda1)"
        );
        let (_, reason) = grade(Prefer, Frazil, &FreezeOutcome::Frozen { count: 7, coverage }, None, None);
        assert!(reason.ends_with("(/0, /1, /2, /3, /4 and 2 more)"), "{reason}");
    }
}
