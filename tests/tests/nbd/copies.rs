//! Whole disks, read by those who make copies of them.

use std::process::Command;

use super::served::{SIZE, Served, contents, run};

#[test]
fn nbdcopy_copies_every_kind_of_export() {
    let folder = tempfile::tempdir().unwrap();
    for content in contents(folder.path()) {
        let served = Served::new(content.export);
        assert!(served.copied() == content.bytes, "{}", content.kind);
        // One connection, one request at a time; and without extents, so that holes are found in reads.
        for arguments in [&["--connections=1", "--requests=1"][..], &["--no-extents", "--synchronous"]] {
            let copy = served.path("other");
            run(Command::new("nbdcopy").args(arguments).arg(served.uri()).arg(&copy));
            assert!(std::fs::read(copy).unwrap() == content.bytes, "{} {arguments:?}", content.kind);
        }
    }
}

#[test]
fn qemu_img_converts_and_compares_every_kind_of_export() {
    let folder = tempfile::tempdir().unwrap();
    for content in contents(folder.path()) {
        let served = Served::new(content.export);
        let (dense, copy) = (served.path("dense"), served.path("copy.qcow2"));
        std::fs::write(&dense, &content.bytes).unwrap();
        let same = ["compare", "-f", "raw", "-F", "raw"];
        run(Command::new("qemu-img").args(same).arg(served.uri()).arg(&dense));
        run(Command::new("qemu-img")
            .args(["convert", "-m", "8", "-W", "-f", "raw", "-O", "qcow2"])
            .arg(served.uri())
            .arg(&copy));
        run(Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&copy).arg(&dense));
        std::fs::write(&dense, [&content.bytes[..content.bytes.len() - 1], b"x"].concat()).unwrap();
        let other = Command::new("qemu-img").args(same).arg(served.uri()).arg(&dense).output().unwrap();
        assert_eq!(other.status.code(), Some(1), "a byte that differs is found");
    }
}

#[test]
fn many_copies_at_once_are_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let content = contents(folder.path()).remove(2);
    let served = Served::new(content.export);
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (served, bytes) = (&served, &content.bytes);
            scope.spawn(move || {
                let copy = served.path(&format!("copy{number}"));
                run(Command::new("nbdcopy").arg("--connections=4").arg(served.uri()).arg(&copy));
                assert!(std::fs::read(copy).unwrap() == *bytes);
            });
        }
    });
    assert_eq!(content.bytes.len() as u64, SIZE);
}
