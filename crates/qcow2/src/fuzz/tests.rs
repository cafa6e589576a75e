use std::time::Duration;

use super::*;

/// How long each target runs here. `make fuzz` runs them longer.
const TIME: Duration = Duration::from_secs(2);

fn drive(name: &str) {
    let (_, target) = TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    block::testing::drive(name, *target, TIME);
}

/// Each in a test of its own, so that they run beside each other and tell their names.
macro_rules! driven {
    ($($name:ident)*) => {
        $(#[test] fn $name() { drive(stringify!($name)); })*

        #[test]
        fn every_target_is_driven() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

driven!(header extensions directory bitmap refcounts compressed tables check journal);
