//! What QEMU's tools say of the images.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs `qemu-img`, which must start.
pub(crate) fn qemu_img(arguments: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(arguments).output();
    output.expect("qemu-img does not start; `make deps` installs it (Debian package qemu-utils)")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `qemu-img check`: neither errors nor leaks.
pub(crate) fn check_clean(image: &Path) {
    expect(&["check", "-f", "qcow2", text(image)], &[0]);
}

/// `qemu-img check`: no errors; what was handed out and not yet used may leak, as after a kill.
pub(crate) fn check_sound(image: &Path) {
    expect(&["check", "-f", "qcow2", text(image)], &[0, 3]);
}

/// `qemu-img compare`: the raw image reads as the other one with all that is beneath it.
pub(crate) fn same(raw: &Path, image: &Path, format: &str) {
    expect(&["compare", "-f", "raw", "-F", format, text(raw), text(image)], &[0]);
}

/// A process that was killed lets go of its locks only when the kernel has ended its io_urings, some time later.
const LOCKED: Duration = Duration::from_secs(5);

fn expect(arguments: &[&str], codes: &[i32]) {
    let deadline = Instant::now() + LOCKED;
    let output = loop {
        let output = qemu_img(arguments);
        let locked = String::from_utf8_lossy(&output.stderr).contains("lock");
        if !locked || Instant::now() > deadline {
            break output;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.code().is_some_and(|code| codes.contains(&code)), "qemu-img {arguments:?}: {said}");
}
