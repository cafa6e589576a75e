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
    let coverage = coverage(&lister(), &mounts, None);
    let named: Vec<_> = coverage.unfreezable().map(ToString::to_string).collect();
    assert_eq!(named, ["/boot/efi (vfat, vda1)"]);
    // A kernel that can freeze it is not distrusted: it is asked to.
    assert_eq!(coverage.targets().len(), 3);
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
fn windows_volumes_count_mounted_or_not() {
    let mounts = [
        mount(r"\\?\Volume{1}\", r"C:\", "NTFS"),
        mount(r"\\?\Volume{2}\", "System Reserved", "NTFS"),
        mount(r"\\?\Volume{3}\", "System Reserved", "FAT32"),
        mount(r"\\?\Volume{4}\", r"D:\", "CDFS"),
    ];
    let coverage = coverage(&lister(), &mounts, None);
    assert_eq!((coverage.means(), coverage.targets().len()), (Means::All, 2));
    assert!(coverage.is_windows());
}

proptest! {
    /// By a model of the agent's walk: if it counts as many as there are targets, every device that can be written was
    /// frozen. The grade of a snapshot rests on this.
    #[test]
    fn a_full_count_means_that_every_writable_device_was_frozen(
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
        if frozen.len() == coverage.targets().len() {
            for (device, kind) in &kinds {
                prop_assert!(*kind == "squashfs" || frozen.contains(device), "vd{device} {kind}");
            }
        }
    }
}
