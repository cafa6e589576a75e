//! The systemd unit, as systemd itself judges it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

/// Of 100: what `systemd-analyze security` calls exposure, which a unit without any hardening has all of.
const MOST_EXPOSED: &str = "22";

/// What `systemd-analyze WORDS… UNIT` says; `None` where there is none. The program that the unit starts is one that is there.
fn analyze(words: &[&str]) -> Option<Output> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("not run: there is no systemd-analyze here");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("frazil@web1.service");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/frazil/dist/frazil@.service");
    let text = std::fs::read_to_string(source).unwrap();
    std::fs::write(&unit, text.replace("/usr/local/bin/frazil", "/bin/true")).unwrap();
    Some(Command::new("systemd-analyze").args(words).arg(&unit).output().unwrap())
}

fn assert_succeeds(output: &Output) {
    let [text, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{text}{errors}");
}

#[test]
fn the_unit_is_hardened_as_systemd_counts_it() {
    if let Some(output) = analyze(&["security", "--offline=true", "--threshold", MOST_EXPOSED]) {
        assert_succeeds(&output);
    }
}

#[test]
fn systemd_understands_every_word_of_the_unit() {
    if let Some(output) = analyze(&["verify"]) {
        assert_succeeds(&output);
        // It goes on after a key that it does not know.
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("frazil@"), "{said}");
    }
}
