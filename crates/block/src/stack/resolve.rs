//! Resolving: asking layers, the newest first, each for what the newer ones lack.

use super::layers::Layers;
use super::runs::{Found, Runs};
use crate::{ByteRange, Error, ErrorKind, Layer, Place, Result};

/// Where the bytes of `range` are in `layers`. Those before `first` are not asked: `beneath` is what they have, and
/// covers `range`. Each layer that was asked is handed to `done` before the next one is.
pub(super) fn resolve(
    layers: &Layers,
    first: usize,
    range: ByteRange,
    beneath: &Runs,
    done: impl Fn(&dyn Layer),
) -> Result<Runs> {
    let mut search = Search { found: Vec::new(), missing: vec![range] };
    for (index, layer) in layers.from(first).rev() {
        if search.missing.is_empty() {
            break;
        }
        let asked = search.ask(index, &**layer);
        done(&**layer);
        asked?;
    }
    let Search { mut found, missing } = search;
    found.extend(missing.into_iter().flat_map(|gap| beneath.pieces(gap)));
    Ok(Runs::collect(range, found))
}

struct Search {
    /// In no order.
    found: Vec<(ByteRange, Found)>,
    /// What no layer so far has, in order.
    missing: Vec<ByteRange>,
}

impl Search {
    /// Looks for what is missing in one more layer.
    fn ask(&mut self, index: usize, layer: &dyn Layer) -> Result<()> {
        let capacity = layer.capacity();
        for gap in std::mem::take(&mut self.missing) {
            let inside = capacity.saturating_sub(gap.offset).min(gap.len);
            self.walk(index, layer, ByteRange { len: inside, ..gap })?;
            if inside < gap.len {
                // Whatever is beneath: the layer ends here, and zeroes follow.
                let past = ByteRange { offset: gap.offset + inside, len: gap.len - inside };
                self.found.push((past, Found::Zero));
            }
        }
        Ok(())
    }

    fn walk(&mut self, index: usize, layer: &dyn Layer, gap: ByteRange) -> Result<()> {
        let mut rest = gap;
        while rest.len > 0 {
            let run = layer.run_at(rest)?;
            let len = run.range.len;
            if run.range.offset != rest.offset || len == 0 || len > rest.len {
                // A walk that does not get on would never end.
                return Err(Error::new(ErrorKind::Corrupt, "a layer's run is not where it was asked for"));
            }
            match run.place {
                Place::Absent => self.miss(run.range),
                Place::Zero => self.found.push((run.range, Found::Zero)),
                Place::Data(offset) => self.found.push((run.range, Found::Data { layer: index, offset })),
                Place::Packed => self.found.push((run.range, Found::Packed { layer: index })),
            }
            rest = ByteRange { offset: rest.offset + len, len: rest.len - len };
        }
        Ok(())
    }

    fn miss(&mut self, range: ByteRange) {
        match self.missing.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ => self.missing.push(range),
        }
    }
}
