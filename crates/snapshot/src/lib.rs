//! The cut: consistent snapshots of a group of disks.
