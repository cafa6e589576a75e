//! Images of QEMU's making: of all kinds, with all that an image may hold beside its data.

use std::path::Path;
use std::process::Command;

use block::testing::Random;

/// Options of `qemu-img create`: tables of new clusters all the time with the smallest ones.
const KINDS: &[&str] = &[
    "compat=1.1,cluster_size=512",
    "compat=1.1,cluster_size=64k",
    "compat=1.1,cluster_size=16k,extended_l2=on",
    "compat=1.1,cluster_size=512,refcount_bits=1",
    "compat=1.1,cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
    "compat=0.10,cluster_size=1k",
];

/// The bytes of an image that shows `contents`.
pub(crate) fn make(folder: &Path, random: &mut Random, contents: &[u8]) -> Vec<u8> {
    let (raw, path) = (folder.join("contents"), folder.join("base.qcow2"));
    std::fs::write(&raw, contents).unwrap();
    let kind = KINDS[random.below(KINDS.len() as u64) as usize];
    let (raw, image) = (raw.to_str().unwrap(), path.to_str().unwrap());
    let compressed: &[&str] = if random.one_in(3) { &["-c"] } else { &[] };
    let convert = [&["convert", "-O", "qcow2", "-o", kind], compressed, &[raw, image]].concat();
    qemu_img(&convert);
    if !kind.contains("refcount_bits=1") && random.one_in(2) {
        qemu_img(&["snapshot", "-c", "internal", image]);
    }
    if !kind.contains("0.10") && random.one_in(2) {
        qemu_img(&["bitmap", "--add", "-g", "4096", image, "kept"]);
    }
    std::fs::read(path).unwrap()
}

/// The bytes of an empty overlay with a dirty bitmap that follows writes, on an image of that name and format.
pub(crate) fn make_overlay(
    folder: &Path,
    random: &mut Random,
    beneath: (&str, &str),
    capacity: u64,
) -> Vec<u8> {
    let path = folder.join("overlay.qcow2");
    let (image, size) = (path.to_str().unwrap(), capacity.to_string());
    let kind = random.pick(&["cluster_size=512", "cluster_size=4k", "cluster_size=16k,extended_l2=on"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, image, &size]);
    qemu_img(&["bitmap", "--add", "-g", "4096", image, "kept"]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", beneath.0, "-F", beneath.1, image]);
    std::fs::read(path).unwrap()
}

fn qemu_img(arguments: &[&str]) {
    let done = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
}
