//! What is asked of a backup, by itself.

use block::Result;

use super::invalid;
use crate::model::{BackupOptions, BitmapMode, Sync};

/// Whether it makes sense: the rules and words of QEMU's `do_backup_common` (`blockdev.c`, `block/backup.c`).
pub(super) fn check(options: &BackupOptions) -> Result<()> {
    use BitmapMode::{Never, OnSuccess};
    match (options.sync, &options.bitmap, options.bitmap_mode) {
        (Sync::Incremental, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'incremental' sync mode"));
        }
        (Sync::Bitmap, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'bitmap' sync mode"));
        }
        (Sync::Incremental, Some(_), mode) if mode.is_some_and(|mode| mode != OnSuccess) => {
            return Err(invalid("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"));
        }
        (Sync::Full | Sync::Top | Sync::None | Sync::Bitmap, Some(_), None) => {
            return Err(invalid("Bitmap sync mode must be given when providing a bitmap"));
        }
        (Sync::None, Some(_), Some(_)) => {
            return Err(invalid("sync mode 'none' does not produce meaningful bitmap outputs"));
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
