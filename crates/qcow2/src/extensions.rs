//! Header extensions, kept as they are found: what Frazil does not know survives its changes of the header.

use block::{Error, ErrorKind, Result};

use crate::bytes::be32;

const END: u32 = 0;
/// "Backing file format name string".
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// "Feature name table": names for messages, of use to nobody else.
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
/// "Bitmaps extension".
pub(crate) const BITMAPS: u32 = 0x2385_2875;
/// "Full disk encryption header pointer".
pub(crate) const ENCRYPTION: u32 = 0x0537_be77;
/// "External data file name string".
pub(crate) const DATA_FILE: u32 = 0x4441_5441;

/// One extension.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Extension {
    kind: u32,
    body: Vec<u8>,
}

/// The extension area of a header, in the file's order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Extensions(Vec<Extension>);

impl Extensions {
    /// Decodes `area`: all that is between the header's fields and the backing file's name, or the end of the first
    /// cluster. Returns also how many bytes of it are in use, the end mark included.
    pub(crate) fn decode(area: &[u8]) -> Result<(Self, usize)> {
        let corrupt = |what: &str| Error::new(ErrorKind::Corrupt, what);
        let mut found = Self::default();
        let mut at = 0;
        while let Some(head) = area.get(at..at + 8) {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            at += 8;
            if kind == END {
                break;
            }
            let body = area.get(at..).and_then(|rest| rest.get(..len));
            let body = body.ok_or_else(|| corrupt("a header extension is cut off"))?;
            // "Each header extension type shall appear at most once in the same image."
            if found.get(kind).is_some() {
                return Err(corrupt("a header extension appears twice"));
            }
            found.0.push(Extension { kind, body: body.to_vec() });
            at += len.next_multiple_of(8);
        }
        Ok((found, at.min(area.len())))
    }

    /// Appends the area's bytes to `out`, with the end mark.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for Extension { kind, body } in &self.0 {
            out.extend(kind.to_be_bytes());
            out.extend((body.len() as u32).to_be_bytes());
            out.extend(body);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
    }

    /// The contents of the extension of this kind.
    pub(crate) fn get(&self, kind: u32) -> Option<&[u8]> {
        self.0.iter().find(|extension| extension.kind == kind).map(|extension| &*extension.body)
    }

    /// The same extensions, that of this kind replaced where it is, appended if there is none, or left out.
    pub(crate) fn with(&self, kind: u32, body: Option<&[u8]>) -> Self {
        let mut changed = self.clone();
        let at = changed.0.iter().position(|extension| extension.kind == kind);
        match (at, body) {
            (Some(at), Some(body)) => changed.0[at].body = body.to_vec(),
            (None, Some(body)) => changed.0.push(Extension { kind, body: body.to_vec() }),
            (Some(at), None) => _ = changed.0.remove(at),
            (None, None) => {}
        }
        changed
    }

    /// What the feature name table calls bit `bit` of the incompatible features.
    pub(crate) fn incompatible_name(&self, bit: u32) -> Option<String> {
        let table = self.get(FEATURE_NAMES)?;
        let entry = table.chunks_exact(48).find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)?;
        let name = String::from_utf8_lossy(&entry[2..]);
        Some(name.trim_end_matches('\0').to_owned()).filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Extensions {
        let none = Extensions::default();
        let two = none.with(BACKING_FORMAT, Some(b"raw")).with(0x1234, Some(&[1; 13]));
        two.with(BITMAPS, Some(&[2; 24]))
    }

    #[test]
    fn what_is_decoded_is_encoded_again() {
        let mut bytes = Vec::new();
        three().encode(&mut bytes);
        let used = bytes.len();
        assert_eq!(used, 16 + 24 + 32 + 8);
        bytes.extend([0xff; 40]);
        assert_eq!(Extensions::decode(&bytes).unwrap(), (three(), used));
        assert_eq!((three().get(BITMAPS), three().get(DATA_FILE)), (Some(&[2; 24][..]), None));
        // The area may end without a mark, and within the last one's padding.
        assert_eq!(Extensions::decode(&bytes[..38]).unwrap().0, three().with(BITMAPS, None));
        assert_eq!(Extensions::decode(&bytes[..7]).unwrap(), (Extensions::default(), 0));
    }

    #[test]
    fn contradictions_are_refused() {
        let mut bytes = Vec::new();
        three().encode(&mut bytes);
        assert_eq!(Extensions::decode(&bytes[..30]).unwrap_err().kind(), ErrorKind::Corrupt);
        let twice = [&bytes[..16], &bytes[..16]].concat();
        assert_eq!(Extensions::decode(&twice).unwrap_err().kind(), ErrorKind::Corrupt);
        bytes[4..8].fill(0xff);
        assert_eq!(Extensions::decode(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_change_leaves_the_others_where_they_are() {
        let other = three().with(BACKING_FORMAT, Some(b"qcow2"));
        assert_eq!(other.get(BACKING_FORMAT), Some(&b"qcow2"[..]));
        let encoded = |extensions: &Extensions| {
            let mut bytes = Vec::new();
            extensions.encode(&mut bytes);
            bytes
        };
        assert_eq!(encoded(&other)[16..], encoded(&three())[16..]);
        assert_eq!(three().with(0x1234, None).get(0x1234), None);
    }
}
