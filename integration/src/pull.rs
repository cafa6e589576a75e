use std::path::Path;
use std::process::Command;

use crate::process::output_of;
use crate::{Context, Result};

/// Reads the bitmap's runs, and puts what is set in it on the file; says how many bytes that was.
const CHANGES: &str = "
h.add_meta_context(context)
h.connect_uri(uri)
size, at, copied = h.get_size(), 0, 0
with open(file, 'r+b') as out:
    out.truncate(size)
    while at < size:
        runs = []
        h.block_status(min(size - at, 1 << 30), at, lambda name, offset, entries, error: runs.extend(entries))
        for length, flags in zip(runs[::2], runs[1::2]):
            while flags & 1 and length:
                part = min(length, 8 << 20)
                out.seek(at)
                out.write(h.pread(part, at))
                at, length, copied = at + part, length - part, copied + part
            at += length
print(copied)
";

/// Copies a whole export to a new file, with `nbdcopy`.
pub fn pull_all(uri: &str, file: &Path) -> Result<()> {
    output_of(Command::new("nbdcopy").arg(uri).arg(file)).map(drop)
}

/// Brings a copy of an export up to date with what is set in its dirty bitmap `bitmap`, with libnbd's `nbdsh`; gives the
/// bytes that were read for it.
pub fn pull_changes(uri: &str, bitmap: &str, file: &Path) -> Result<u64> {
    let words = format!(
        "uri, context, file = {uri:?}, 'qemu:dirty-bitmap:{bitmap}', {:?}",
        file.display().to_string()
    );
    // Debian's own Python has the module, whatever `python3` is on the path.
    let mut nbdsh = Command::new("/usr/bin/python3");
    let output = output_of(nbdsh.args(["-m", "nbd", "-c", &words, "-c", CHANGES]))?;
    String::from_utf8_lossy(&output).trim().parse().context("nbdsh's count")
}
