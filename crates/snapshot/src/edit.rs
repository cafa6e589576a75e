//! The change of a chain that nobody may be looking at: revert.
//!
//! It works on the state directory alone, with the disks' images closed: the new overlay first, then the manifest, then
//! what that no longer names is removed. A crash in between leaves either manifest, with all the images that it names.

use std::sync::Arc;

use block::{Error, ErrorKind, Result};

use crate::layer::{Layer, Opening};
use crate::manifest::{LayerEntry, Manifest};
use crate::marks::{Boundary, Draft};
use crate::store::Store;

/// Brings the disks of a snapshot back to it: what was written since is gone. Newer snapshots of the same disks are
/// lost with it, so they are refused unless `discard_newer` is set.
pub(crate) fn revert(store: &Store, name: &str, discard_newer: bool) -> Result<()> {
    store.manifest().intact(name)?;
    let spans = spans(&store.manifest(), name)?;
    if !discard_newer {
        for span in &spans {
            refuse_newer(
                &store.manifest(),
                name,
                span,
                "delete those first, or discard them too (discard-newer)",
            )?;
        }
    }
    let mut overlays = Vec::new();
    let reverted = create_overlays(store, &spans, &mut overlays).and_then(|()| {
        let mut draft = Draft::new(store);
        for (span, overlay) in spans.iter().zip(&overlays) {
            turn_back(&mut draft.manifest, span, &overlay.entry);
        }
        spans.iter().zip(&overlays).try_for_each(|(span, overlay)| fold(&mut draft, span, &overlay.entry))?;
        draft.commit(|manifest| {
            for (span, overlay) in spans.iter().zip(&overlays) {
                turn_back(manifest, span, &overlay.entry);
            }
            Ok(())
        })
    });
    match reverted {
        Ok(()) => remove_above(store, &spans),
        Err(_) => {
            spans.iter().zip(&overlays).for_each(|(span, overlay)| store.discard(&span.id, &overlay.entry));
        }
    }
    reverted
}

/// Makes an overlay on the layer of each span. On an error, `overlays` has those that were made.
fn create_overlays(store: &Store, spans: &[Span], overlays: &mut Vec<Arc<Layer>>) -> Result<()> {
    for span in spans {
        let layers = store.open_layers(&span.id, span.layer + 1, Opening::OFFLINE, None)?;
        let (base, top) = (&layers[0], &layers[span.layer]);
        overlays.push(store.create_overlay(&span.id, base, top, Opening::OFFLINE)?);
    }
    Ok(())
}

/// Cuts a disk's chain off above a snapshot, with the snapshots that lie there, and puts `overlay` on top.
fn turn_back(manifest: &mut Manifest, span: &Span, overlay: &LayerEntry) {
    let newer = manifest.snapshots_from(&span.id, span.layer + 1);
    let lost: Vec<_> = newer.iter().map(|newer| newer.name.clone()).collect();
    lost.iter().for_each(|name| manifest.forget(name));
    if let Ok(disk) = manifest.disk(&span.id) {
        let holder = disk.layers[span.layer].clone();
        manifest.push_layer(&span.id, &holder, overlay);
    }
}

/// Keeps what the layers above a snapshot tell of changes, as far as checkpoints and bitmaps need it. `overlay` is put in
/// their place.
fn fold(draft: &mut Draft<'_>, span: &Span, overlay: &LayerEntry) -> Result<()> {
    let gone: Vec<_> = span.above.iter().map(|layer| layer.number).collect();
    let store = draft.store();
    let open = || store.open_layers(&span.id, span.layer + 1 + gone.len(), Opening::OFFLINE, None);
    draft.fold_revert(&span.id, open, &gone, (span.boundary, overlay.number))
}

/// One disk's part of a snapshot: the index of the layer that holds it, and what lies above.
struct Span {
    id: String,
    layer: usize,
    /// The snapshot's instant.
    boundary: Boundary,
    above: Vec<LayerEntry>,
}

fn spans(manifest: &Manifest, name: &str) -> Result<Vec<Span>> {
    let mut spans = Vec::new();
    for disk in &manifest.snapshot(name)?.disks {
        let layer = manifest.layer_of(name, &disk.id)?;
        let layers = &manifest.disk(&disk.id)?.layers;
        let (boundary, above) = (layers[layer].boundary(), layers[layer + 1..].to_vec());
        spans.push(Span { id: disk.id.clone(), layer, boundary, above });
    }
    Ok(spans)
}

fn refuse_newer(manifest: &Manifest, name: &str, span: &Span, remedy: &str) -> Result<()> {
    let newer: Vec<_> =
        manifest.snapshots_from(&span.id, span.layer + 1).iter().map(|newer| newer.name.as_str()).collect();
    if newer.is_empty() {
        return Ok(());
    }
    let story = format!(
        "snapshot '{name}' is not the newest of disk {}: {} came after it; {remedy}",
        span.id,
        newer.join(", ")
    );
    Err(Error::new(ErrorKind::Busy, story))
}

fn remove_above(store: &Store, spans: &[Span]) {
    for span in spans {
        span.above.iter().for_each(|entry| store.discard(&span.id, entry));
    }
}
