//! The vhost-user-blk device and its sessions.
