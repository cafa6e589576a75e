//! Persistent dirty bitmaps: those that an image carries are kept up while it is written, and saved at its close.

mod directory;

pub(crate) use directory::{Directory, TableEntry};
