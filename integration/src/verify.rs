use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::output_of;
use crate::{Context, Daemon, Error, FileSystem, Guest, Kind, Result, Scratch, Snapshot};

/// What a snapshot of one disk must hold.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// The disk's id, the same in the daemon and in the guest.
    pub disk: String,
    /// The file system on it.
    pub file_system: FileSystem,
    /// What each writer had acknowledged before the snapshot was asked for.
    acknowledged: Vec<(Kind, u64)>,
}

impl Expectation {
    /// Asks the guest, before a snapshot, what is acknowledged on each of its disks.
    pub fn of(guest: &mut Guest, disks: &[(&str, FileSystem)]) -> Result<Vec<Self>> {
        let mut expectations = Vec::new();
        for &(disk, file_system) in disks {
            let mut acknowledged = Vec::new();
            for kind in Kind::ALL {
                acknowledged.push((kind, guest.progress(disk, kind)?.acknowledged));
            }
            expectations.push(Self { disk: disk.to_owned(), file_system, acknowledged });
        }
        Ok(expectations)
    }
}

/// Proves with the file systems' own tools that a snapshot is what its grade says.
///
/// Each disk is exported. A `filesystem` snapshot must pass the checker as it is (xfs: replaying the log must change
/// nothing, as a frozen xfs always has one) and its files must be as at one instant. Of a `crash` snapshot, the files
/// must hold all that was acknowledged once a second guest has mounted it, and the checker must pass after that.
///
/// Returns the disks' verdicts in words.
pub fn verify(
    scratch: &Scratch,
    daemon: &Daemon,
    snapshot: &Snapshot,
    expected: &[Expectation],
) -> Result<Vec<String>> {
    let mut exports = Vec::new();
    for expectation in expected {
        exports.push(daemon.export(&snapshot.name, &expectation.disk)?);
    }
    let verdicts =
        verify_images(scratch, &snapshot.name, snapshot.grade == "filesystem", expected, &exports)?;
    for export in exports {
        std::fs::remove_file(&export).context(export.display())?;
    }
    Ok(verdicts)
}

/// As [`verify`], of raw images, one for each expectation. They are changed by the replay.
pub fn verify_images(
    scratch: &Scratch,
    name: &str,
    frozen: bool,
    expected: &[Expectation],
    images: &[PathBuf],
) -> Result<Vec<String>> {
    let second_name = format!("{name}-second");
    let mut second = Guest::builder(scratch, &second_name);
    for (expectation, image) in expected.iter().zip(images) {
        if frozen && expectation.file_system != FileSystem::Xfs {
            check_image(expectation.file_system, image)?;
        }
        second = second.image_disk(image, "raw");
    }

    let mut second = second.boot()?;
    for (letter, expectation) in ('a'..='z').zip(expected) {
        check_files(&mut second, &format!("vd{letter}"), expectation, frozen)
            .context(format!("{} of {name}", expectation.disk))?;
    }
    second.shut_down()?;

    let mut verdicts = Vec::new();
    for (expectation, image) in expected.iter().zip(images) {
        if expectation.file_system == FileSystem::Vfat {
            clear_dirty_mark(image)?;
        }
        check_image(expectation.file_system, image)?;
        let verdict = match (frozen, expectation.file_system) {
            (true, FileSystem::Xfs) => "clean, replay changes nothing",
            (true, _) => "clean",
            (false, _) => "clean after replay",
        };
        verdicts.push(verdict.to_owned());
    }
    Ok(verdicts)
}

/// Mounts a disk, which replays what there is to replay, checks the writers' files, and unmounts it.
pub(crate) fn check_files(
    guest: &mut Guest,
    disk: &str,
    expectation: &Expectation,
    frozen: bool,
) -> Result<()> {
    let file_system = expectation.file_system;
    let unreplayed = if frozen && file_system == FileSystem::Xfs {
        guest.mount(disk, file_system, "ro,norecovery")?;
        let print = fingerprint(guest, disk)?;
        guest.run(&format!("umount /mnt/{disk}"))?;
        Some(print)
    } else {
        None
    };
    guest.mount(disk, file_system, "rw")?;
    if let Some(unreplayed) = unreplayed {
        let replayed = fingerprint(guest, disk)?;
        if unreplayed != replayed {
            let error = Error::new("replaying the log changed the file system");
            return Err(error.with("before", &unreplayed).with("after", &replayed));
        }
    }
    let mode = if frozen { "exact" } else { "at-least" };
    for (kind, acknowledged) in &expectation.acknowledged {
        let name = kind.name();
        guest.run(&format!("guest-workload check {name} /mnt/{disk}/{name} {acknowledged} {mode}"))?;
    }
    guest.run(&format!("umount /mnt/{disk}")).map(drop)
}

/// Names, kinds, sizes, times and content of all files.
fn fingerprint(guest: &mut Guest, disk: &str) -> Result<String> {
    guest.run(&format!(
        "cd /mnt/{disk} && find . | sort | xargs stat -c '%n %f %s %b %Y' && find . -type f | sort | xargs md5sum"
    ))
}

/// Runs the file system's own checker, which must find nothing to do or to say.
fn check_image(file_system: FileSystem, image: &Path) -> Result<()> {
    match file_system {
        FileSystem::Ext4 => {
            let header = run("dumpe2fs", &["-h"], image)?;
            if header.contains("needs_recovery") {
                return Err(Error::new(format!("{}: the journal needs replay", image.display())));
            }
            run("e2fsck", &["-fn"], image).map(drop)
        }
        FileSystem::Xfs => run("xfs_repair", &["-n", "-f"], image).map(drop),
        FileSystem::Btrfs => {
            let header = run("btrfs", &["inspect-internal", "dump-super"], image)?;
            let no_log = |line: &str| line.split_whitespace().eq(["log_root", "0"]);
            if !header.lines().any(no_log) {
                return Err(Error::new(format!("{}: the log tree needs replay", image.display())));
            }
            run("btrfs", &["check", "--readonly"], image).map(drop)
        }
        FileSystem::Vfat => run("fsck.vfat", &["-n"], image).map(drop),
    }
}

/// A vfat that was mounted at the cut has its dirty mark set, and nothing to replay; the checker clears it, and may
/// correct the count of free clusters, which is a hint. It must find nothing else.
fn clear_dirty_mark(image: &Path) -> Result<()> {
    let output = Command::new("fsck.vfat").arg("-a").arg(image).output().context("fsck.vfat")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // Exit status 1 says that errors were corrected.
    let serious =
        text.contains("cluster chain") || text.contains("Reclaimed") || text.contains("FATs differ");
    if matches!(output.status.code(), Some(0 | 1)) && !serious {
        return Ok(());
    }
    Err(Error::new(format!("fsck.vfat -a: {}", output.status)).with("output", &text))
}

fn run(tool: &str, arguments: &[&str], image: &Path) -> Result<String> {
    let output = output_of(Command::new(tool).args(arguments).arg(image))?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// `qemu-img check` on each qcow2 image of a snapshot: no error, and no leak either unless the daemon was killed.
pub fn check_images(snapshot: &Snapshot) -> Result<()> {
    let images: Vec<&PathBuf> =
        snapshot.disks.iter().filter(|disk| disk.format == "qcow2").map(|disk| &disk.path).collect();
    for image in images {
        output_of(Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(image))?;
    }
    Ok(())
}
