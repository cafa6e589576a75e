//! Resolving: asking layers, the newest first, each for what the newer ones lack.

use super::layers::Layers;
use super::runs::{Found, Runs};
use crate::{ByteRange, Error, ErrorKind, Layer, Place, Result, Run};

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
    ///
    /// A run is asked for as far as anything is missing, not to the end of a gap: deep in a chain there may be thousands of
    /// gaps, and most layers have nothing for all of them.
    fn ask(&mut self, index: usize, layer: &dyn Layer) -> Result<()> {
        let capacity = layer.capacity();
        let gaps = std::mem::take(&mut self.missing);
        let end = gaps.last().map_or(0, ByteRange::end).min(capacity);
        let mut run = Run { range: ByteRange { offset: 0, len: 0 }, place: Place::Absent };
        for gap in gaps {
            let inside = capacity.saturating_sub(gap.offset).min(gap.len);
            let mut rest = ByteRange { len: inside, ..gap };
            while rest.len > 0 {
                if run.range.end() <= rest.offset {
                    // What can not be looked up may be where nothing is missing.
                    let far = ByteRange { len: end - rest.offset, ..rest };
                    run = run_at(layer, far).or_else(|_| run_at(layer, rest))?;
                }
                let len = rest.len.min(run.range.end() - rest.offset);
                self.add(index, ByteRange { len, ..rest }, run);
                rest = ByteRange { offset: rest.offset + len, len: rest.len - len };
            }
            if inside < gap.len {
                // Whatever is beneath: the layer ends here, and zeroes follow.
                let past = ByteRange { offset: gap.offset + inside, len: gap.len - inside };
                self.found.push((past, Found::Zero));
            }
        }
        Ok(())
    }

    /// Adds `part` of a run of the layer with this index.
    fn add(&mut self, index: usize, part: ByteRange, run: Run) {
        match run.place {
            Place::Absent => self.miss(part),
            Place::Zero => self.found.push((part, Found::Zero)),
            Place::Data(offset) => {
                let offset = offset + (part.offset - run.range.offset);
                self.found.push((part, Found::Data { layer: index, offset }));
            }
            Place::Packed => self.found.push((part, Found::Packed { layer: index })),
        }
    }

    fn miss(&mut self, range: ByteRange) {
        match self.missing.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ => self.missing.push(range),
        }
    }
}

/// The layer's run at the start of `range`.
fn run_at(layer: &dyn Layer, range: ByteRange) -> Result<Run> {
    let run = layer.run_at(range)?;
    match run.range.offset == range.offset && (1..=range.len).contains(&run.range.len) {
        true => Ok(run),
        // A walk that does not get on would never end.
        false => Err(Error::new(ErrorKind::Corrupt, "a layer's run is not where it was asked for")),
    }
}
