use proptest::prelude::*;

use super::*;

fn mount(name: &str, mountpoint: &str, kind: &str) -> FileSystem {
    FileSystem { name: name.into(), mountpoint: mountpoint.into(), kind: kind.into(), disk: Vec::new() }
}

fn on(mut mount: FileSystem, serials: &[&str]) -> FileSystem {
    let disk = |serial: &&str| DiskAddress { serial: Some((*serial).to_owned()), dev: None };
    mount.disk = serials.iter().map(disk).collect();
    mount
}

fn lister() -> AgentInfo {
    AgentInfo::new("7.2.22", ["guest-fsfreeze-freeze-list"])
}

fn points(coverage: &Coverage) -> Vec<&str> {
    coverage.mountpoints().collect()
}

fn clean(count: u64) -> Thawed {
    Thawed { count, complaint: None }
}

const SOON: Duration = Duration::from_millis(100);

#[test]
fn bind_mounts_and_subvolumes_count_once() {
    let mounts = [
        mount("vda1", "/", "ext4"),
        mount("vda1", "/var/lib/bind", "ext4"),
        mount("vdb", "/home", "btrfs"),
        mount("vdb", "/home/snapshots", "btrfs"),
    ];
    let coverage = coverage(&lister(), &mounts, None);
    assert_eq!(points(&coverage), ["/", "/home"]);
    assert!(coverage.grade(2, SOON, &clean(2)).whole);
    assert!(!coverage.grade(4, SOON, &clean(4)).whole);
}

#[test]
fn what_cannot_be_written_need_not_be_frozen() {
    let mounts = [
        mount("vda1", "/", "ext4"),
        mount("loop0", "/snap/core", "squashfs"),
        mount("sr0", "/media/cd", "udf"),
        mount("sr1", "/media/cd1", "iso9660"),
    ];
    assert_eq!(points(&coverage(&lister(), &mounts, None)), ["/"]);
}

#[test]
fn an_unfreezable_file_system_is_named() {
    let mounts =
        [mount("vda2", "/", "ext4"), mount("vda1", "/boot/efi", "vfat"), mount("vdb", "/srv", "xfs")];
    let verdict = coverage(&lister(), &mounts, None).judge_freeze(2);
    assert!(!verdict.whole);
    assert!(
        verdict.reason.contains("2 of 3") && verdict.reason.contains("/boot/efi (vfat, vda1)"),
        "{}",
        verdict.reason
    );
    assert!(!verdict.reason.contains("/srv"), "{}", verdict.reason);
    // A kernel that can freeze it is not distrusted.
    assert!(coverage(&lister(), &mounts, None).judge_freeze(3).whole);
}

#[test]
fn a_short_count_without_a_suspect_names_all() {
    let mounts = [mount("vda2", "/", "ext4"), mount("vdb", "/srv", "xfs")];
    let verdict = coverage(&lister(), &mounts, None).judge_freeze(1);
    assert!(
        verdict.reason.contains("/srv") && verdict.reason.contains("somebody else"),
        "{}",
        verdict.reason
    );
}

#[test]
fn nothing_mounted_is_no_proof_of_anything() {
    assert!(!coverage(&lister(), &[], None).judge_freeze(0).whole);
}

#[test]
fn a_file_system_is_left_out_only_if_it_is_certainly_elsewhere() {
    let mounts = [
        on(mount("vda1", "/", "ext4"), &["root"]),
        on(mount("vdb", "/data", "xfs"), &["data"]),
        on(mount("dm-0", "/lvm", "xfs"), &["root", "data"]),
        on(mount("vdd", "/pool", "btrfs"), &["root"]),
        on(mount("vde", "/odd", "xfs"), &["a b"]),
        on(mount("vdf", "/empty", "xfs"), &[""]),
        mount("loop1", "/image", "ext4"),
    ];
    let ours = ["data".to_owned()];
    let mut listed =
        coverage(&lister(), &mounts, Some(&ours)).mountpoints().map(str::to_owned).collect::<Vec<_>>();
    listed.sort();
    assert_eq!(listed, ["/data", "/empty", "/image", "/lvm", "/odd", "/pool"]);
    // Without the list command the count is that of all file systems, so all are expected.
    assert_eq!(coverage(&AgentInfo::default(), &mounts, Some(&ours)).targets().len(), mounts.len());
    // udev may have rewritten such a serial: nothing can be told apart by it.
    assert_eq!(coverage(&lister(), &mounts, Some(&["da ta".to_owned()])).targets().len(), mounts.len());
}

#[test]
fn a_serial_is_compared_as_far_as_a_guest_sees_it() {
    let mounts = [on(mount("vdb", "/data", "xfs"), &["0123456789abcdefghij"])];
    let ours = ["0123456789abcdefghijKLMN".to_owned()];
    assert_eq!(coverage(&lister(), &mounts, Some(&ours)).targets().len(), 1);
}

#[test]
fn a_mount_point_that_is_mounted_over_is_avoided() {
    let mounts = [mount("vdb", "/mnt", "xfs"), mount("vdb", "/other", "xfs"), mount("vdc", "/mnt", "ext4")];
    // `/mnt` leads to vdc only.
    assert_eq!(points(&coverage(&lister(), &mounts, None)), ["/other", "/mnt"]);
}

#[test]
fn another_thaw_count_means_that_somebody_else_was_there() {
    let coverage = coverage(&lister(), &[mount("vda1", "/", "ext4")], None);
    let verdict = coverage.grade(1, SOON, &clean(0));
    assert!(!verdict.whole && verdict.reason.contains("somebody else"), "{}", verdict.reason);
    assert!(coverage.grade(1, Duration::from_secs(60), &clean(1)).whole, "Linux has no limit of its own");
}

#[test]
fn windows_volumes_count_mounted_or_not_and_thaw_themselves() {
    let mounts = [
        mount(r"\\?\Volume{1}\", r"C:\", "NTFS"),
        mount(r"\\?\Volume{2}\", "System Reserved", "NTFS"),
        mount(r"\\?\Volume{3}\", "System Reserved", "FAT32"),
        mount(r"\\?\Volume{4}\", r"D:\", "CDFS"),
    ];
    let coverage = coverage(&lister(), &mounts, None);
    assert_eq!((coverage.means(), coverage.targets().len()), (Means::All, 2));
    assert!(coverage.grade(2, SOON, &clean(2)).whole);
    let late = coverage.grade(2, Duration::from_secs(10), &clean(2));
    assert!(!late.whole && late.reason.contains("no more than 10000 ms"), "{}", late.reason);
    let complaint = Some("fsfreeze is limited up to 10 seconds".to_owned());
    let gone = coverage.grade(2, SOON, &Thawed { count: 0, complaint });
    assert!(!gone.whole && gone.reason.contains("limited up to 10 seconds"), "{}", gone.reason);
}

proptest! {
    /// The grade is never better than a model of the agent's walk can prove: every device that can be written was frozen.
    #[test]
    fn a_whole_verdict_means_that_every_writable_device_was_frozen(
        mounts in prop::collection::vec((0_u8..6, 0_u8..8, prop::sample::select(vec!["ext4", "xfs", "vfat", "squashfs"])), 0..12),
        busy in prop::collection::btree_set(0_u8..6, 0..3),
        by_list: bool,
    ) {
        // One type a device, as in life.
        let kinds: BTreeMap<u8, &str> = mounts.iter().map(|(device, _, kind)| (*device, *kind)).collect();
        let mounts: Vec<(u8, u8)> = mounts.iter().map(|(device, point, _)| (*device, *point)).collect();
        let infos: Vec<FileSystem> = mounts
            .iter()
            .map(|(device, point)| mount(&format!("vd{device}"), &format!("/{point}"), kinds[device]))
            .collect();
        let info = if by_list { lister() } else { AgentInfo::default() };
        let coverage = coverage(&info, &infos, None);
        let listed: BTreeSet<&str> = coverage.mountpoints().collect();
        // The walk of qemu-ga: a path leads to the device mounted there last.
        let top: BTreeMap<u8, u8> = mounts.iter().map(|(device, point)| (*point, *device)).collect();
        let mut frozen = BTreeSet::new();
        for (_, point) in mounts.iter().rev() {
            let device = top[point];
            let freezable = matches!(kinds[&device], "ext4" | "xfs") && !busy.contains(&device);
            if freezable && (!by_list || listed.contains(format!("/{point}").as_str())) {
                frozen.insert(device);
            }
        }
        let count = frozen.len() as u64;
        let verdict = coverage.grade(count, SOON, &clean(count));
        if verdict.whole {
            for (device, kind) in &kinds {
                prop_assert!(*kind == "squashfs" || frozen.contains(device), "vd{device} {kind}: {}", verdict.reason);
            }
        }
    }
}
