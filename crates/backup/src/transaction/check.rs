//! What is asked of a backup, by itself.

use block::{Error, ErrorKind, Result};

use super::invalid;
use crate::model::{BackupOptions, BitmapMode, Sync};

/// Whether it makes sense: the rules and words of QEMU's `do_backup_common` (`blockdev.c`, `block/backup.c`).
pub(super) fn check(options: &BackupOptions) -> Result<()> {
    use BitmapMode::{Never, OnSuccess};
    let unsupported = |story: &str| Err(Error::new(ErrorKind::Unsupported, story));
    match (options.sync, &options.bitmap, options.bitmap_mode) {
        (Sync::None, ..) => {
            return unsupported(
                "sync 'none' is not there: read the disk through copy-before-write and snapshot-access",
            );
        }
        (Sync::Incremental, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'incremental' sync mode"));
        }
        (Sync::Bitmap, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'bitmap' sync mode"));
        }
        (Sync::Incremental, Some(_), mode) if mode.is_some_and(|mode| mode != OnSuccess) => {
            return Err(invalid("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"));
        }
        (Sync::Full | Sync::Top | Sync::Bitmap, Some(_), None) => {
            return Err(invalid("Bitmap sync mode must be given when providing a bitmap"));
        }
        (Sync::Full | Sync::Top, Some(_), Some(Never)) => {
            return Err(invalid(
                "Bitmap sync mode 'never' has no meaningful effect when combined with a whole copy",
            ));
        }
        (_, None, Some(_)) => return Err(invalid("Cannot specify bitmap sync mode without a bitmap")),
        _ => {}
    }
    Ok(())
}
