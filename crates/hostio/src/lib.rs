//! The one room that talks to the kernel about files: opening and locking images, punching holes, replacing small
//! files atomically, listening at sockets, and submitting I/O through io_uring.
//!
//! Everything here is a thin, safe skin. What needs `unsafe` opens it for its own module and says why.

mod file;
mod inherited;
mod limits;
mod lock;
mod mapped;
mod peers;
mod ring;
mod sandbox;
mod small;
mod socket;

pub use file::{Cache, HostFile, Open, Writing};
pub use inherited::inherited;
pub use limits::raise_open_files;
pub use mapped::MappedFile;
pub use peers::{accept, admit_only};
pub use ring::{Completion, Ring, read_cached, read_now, write_now};
pub use sandbox::{Confined, Held, Reach, Sandbox, confine, explain};
pub use small::{boot_id, free_space, remove_file, replace_file, sync_dir};
pub use socket::{Listener, Loopback};
