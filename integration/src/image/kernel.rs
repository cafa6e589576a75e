use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::{Context, Error, Result};

/// Places in the setup header of a bzImage (Linux, `arch/x86/boot.rst`, protocol 2.08 and later).
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// What `lz4 -l` puts in front, the form that the kernel's build uses.
const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// After the packed kernel comes its unpacked size, which `lz4` would take for a further frame.
const TRAILER: usize = 4;

/// Takes the kernel proper out of a bzImage.
///
/// QEMU starts it through its PVH entry, which saves unpacking it inside an emulated machine.
pub(super) fn unpack(image: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(image).context(image.display())?;
    let packed = payload(&bytes).ok_or_else(|| Error::new(format!("{}: not a bzImage", image.display())))?;
    if !packed.starts_with(&LZ4_LEGACY) {
        return Err(Error::new(format!("{}: packed with something other than lz4", image.display())));
    }
    let mut child =
        Command::new("lz4").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("lz4")?;
    let stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        // Both ends at once: a pipe holds less than a kernel.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(packed)));
        child.wait_with_output()
    })
    .context("lz4")?;
    if !output.status.success() {
        return Err(Error::new(format!("lz4: {}", output.status)));
    }
    Ok(output.stdout)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    let setup = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * SECTOR;
    let start = setup.checked_add(word(PAYLOAD_OFFSET)?)?;
    let length = word(PAYLOAD_LENGTH)?.checked_sub(TRAILER)?;
    image.get(start..start.checked_add(length)?)
}
