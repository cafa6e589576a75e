//! The systemd unit, as systemd itself judges it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

/// Of 100: what `systemd-analyze security` calls exposure, which a unit without any hardening has all of.
const MOST_EXPOSED: &str = "25";

#[test]
fn the_unit_is_hardened_as_systemd_counts_it() {
    let version = Command::new("systemd-analyze").arg("--version").output();
    if version.is_err() {
        println!("not run: there is no systemd-analyze here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("frazil@web1.service");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/frazil/dist/frazil@.service");
    std::fs::copy(source, &unit).unwrap();
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--threshold", MOST_EXPOSED]).arg(&unit);
    let output = analyze.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
