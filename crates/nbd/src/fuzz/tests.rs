//! Each target on its seeds and on mutations of them, for a moment.

use block::testing::{drive, keep_seeds};

use super::*;
use crate::testing::{info_data, meta_data, option};

/// How long the mutations of one target run here. `make fuzz` runs them longer.
const MOMENT: Duration = Duration::from_secs(3);

#[test]
fn negotiations_go_as_the_model_says() {
    let talk = |mode: u8, options: &[Vec<u8>]| [&[mode, 0, 0, 0, 3][..], &options.concat()].concat();
    let made = [
        ("0", talk(0, &[option(3, &[]), option(8, &[]), option(9, &meta_data("a", &[])), option(2, &[])])),
        ("1", talk(0, &[option(11, &[]), option(10, &meta_data("a", &["base:allocation", "qemu:"]))])),
        (
            "2",
            talk(
                2,
                &[option(6, &info_data("a", &[1, 2, 3])), option(5, &[]), option(7, &info_data("a", &[3]))],
            ),
        ),
        ("3", talk(1, &[option(3, &[]), option(7, &info_data("a", &[])), option(5, &[])])),
        ("4", talk(0, &[option(1, b"a")])),
    ];
    keep_seeds("nbd_negotiation", &made);
    drive("nbd_negotiation", negotiation, MOMENT);
}

#[test]
fn requests_do_what_the_model_says() {
    let asks = [
        [1, 0, 0, 0, 0, 0, 0, 0, 16, 0],
        [0, 4, 0, 0, 0, 7, 0, 4, 0, 0],
        [1, 32, 0, 1, 0, 0, 0, 1, 0, 1],
        [6, 3, 0, 0, 64, 0, 0, 1, 0, 0],
        [4, 1, 62, 0, 0, 9, 0, 0, 0, 8],
        [7, 8, 0, 0, 0, 0, 0, 3, 0, 0],
        [5, 0, 0, 0, 0, 0, 63, 0, 0, 0],
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let made = [("0", 0), ("1", 1), ("2", 2), ("3", 0x81)];
    keep_seeds("nbd_requests", &made.map(|(name, mode)| (name, [&[mode][..], &asks.concat()].concat())));
    drive("nbd_requests", requests, MOMENT);
}
