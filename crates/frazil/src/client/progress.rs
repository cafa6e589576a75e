//! How far an export is: a bar on standard error where somebody watches, nothing elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The bar; it goes away when it is dropped.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// A bar for copying `disk`, whose size the first report tells.
    pub(super) fn new(disk: &str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        // The template is fixed and tested; indicatif's own bar would do as well.
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar.with_message(disk.to_owned()))
    }

    /// So many bytes of so many are done.
    pub(super) fn report(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
