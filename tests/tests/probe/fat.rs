//! FAT against dosfstools.

use snapshot::probe::{FsKind, Verdict};

use crate::disk::Image;
use crate::expect;
use crate::tools::{ask, run};

/// Entry width, the image's size in MiB, and where Linux's dirty bit is.
const WIDTHS: [(&str, u64, u64); 3] = [("12", 4, 37), ("16", 32, 37), ("32", 64, 65)];

pub(crate) fn make(width: &str, mib: u64) -> Image {
    let image = Image::new(mib << 20);
    run("mkfs.vfat", &["-F", width, "-n", "EFI", image.path()]);
    image
}

/// The first byte of `FAT[1]`'s high half, for FAT16 and FAT32.
fn high_byte(image: &Image, width: &str) -> u64 {
    let boot = image.read(0, 512);
    let fat = u64::from(u16::from_le_bytes([boot[14], boot[15]])) * 512;
    if width == "16" { fat + 3 } else { fat + 7 }
}

#[test]
fn new_ones_are_clean_and_fsck_agrees() {
    for (width, mib, _) in WIDTHS {
        let image = make(width, mib);
        let found = expect(&image, FsKind::Vfat, Verdict::Clean);
        assert_eq!(found.label.as_deref(), Some("EFI"));
        assert!(found.detail.starts_with(&format!("FAT{width},")), "{}", found.detail);
        assert_eq!(ask("fsck.vfat", &["-n", image.path()]).status, 0);
        let version = run("blkid", &["-p", "-o", "value", "-s", "VERSION", image.path()]);
        assert_eq!(version.text.trim(), format!("FAT{width}"));
    }
}

#[test]
fn the_boot_sectors_dirty_bit_is_seen_as_fsck_sees_it() {
    for (width, mib, state) in WIDTHS {
        let image = make(width, mib);
        image.write(state, &[1]);
        assert!(ask("fsck.vfat", &["-n", image.path()]).text.contains("Dirty bit is set"));
        expect(&image, FsKind::Vfat, Verdict::Dirty);
    }
}

#[test]
fn either_bit_of_the_second_entry_makes_it_dirty() {
    for (width, mib, says) in [("16", 32, [0x7f, 0xbf]), ("32", 64, [0x07, 0x0b])] {
        for (bit, text) in says.into_iter().zip(["not unmounted", "I/O errors"]) {
            let image = make(width, mib);
            image.write(high_byte(&image, width), &[bit]);
            let found = expect(&image, FsKind::Vfat, Verdict::Dirty);
            assert!(found.detail.contains(text), "{}", found.detail);
        }
    }
}
