//! Changes of the chain that nobody may be looking at: delete and revert.
//!
//! Both work on the state directory alone, with the disks' images closed. They change the images first where that
//! does not show (a layer that is hidden by what is above it), then the manifest, then remove what it no longer
//! names. A crash in between leaves either manifest with images that are right for it.

use block::{ByteRange, Context, Error, ErrorKind, Result, blocking, read_disk, write_disk};
use hostio::Cache;
use qcow2::Place;

use crate::layer::{Layer, MAX_PENDING};
use crate::manifest::{LayerEntry, Manifest};
use crate::store::Store;

/// How much is copied at once.
const CHUNK: u64 = 1 << 20;

/// Forgets the newest snapshot of its disks, and merges what was written since into the image that held it. What the
/// disks show does not change.
pub(crate) fn delete(store: &Store, name: &str) -> Result<()> {
    let spans = spans(&store.manifest(), name)?;
    for span in &spans {
        refuse_newer(&store.manifest(), name, span, "delete those first")?;
    }
    for span in &spans {
        let count = span.layer + 1 + span.above.len();
        let layers = store.open_layers(&span.id, count, Cache::Writeback, Some(span.layer))?;
        let (beneath, above) = layers.split_at(span.layer + 1);
        let Some(target) = beneath.last() else { continue };
        for layer in above {
            merge_down(layer, target)?;
        }
        target.flush()?;
    }
    store.update(|manifest| {
        for span in &spans {
            truncate(manifest, span);
        }
        manifest.snapshots.retain(|snapshot| snapshot.name != name);
        Ok(())
    })?;
    remove_above(store, &spans)
}

/// Brings the disks of a snapshot back to it: what was written since is gone. Newer snapshots of the same disks are
/// lost with it, so they are refused unless `discard_newer` is set.
pub(crate) fn revert(store: &Store, name: &str, discard_newer: bool) -> Result<()> {
    let spans = spans(&store.manifest(), name)?;
    if !discard_newer {
        for span in &spans {
            refuse_newer(
                &store.manifest(),
                name,
                span,
                "delete those first, or say that they may be discarded",
            )?;
        }
    }
    let mut overlays = Vec::new();
    for span in &spans {
        let layers = store.open_layers(&span.id, span.layer + 1, Cache::Writeback, None)?;
        if let (Some(base), Some(top)) = (layers.first(), layers.last()) {
            overlays.push((span.id.clone(), store.create_overlay(&span.id, base, top, Cache::Writeback)?));
        }
    }
    let updated = store.update(|manifest| {
        for span in &spans {
            let lost: Vec<_> = manifest
                .snapshots_from(&span.id, span.layer + 1)
                .iter()
                .map(|newer| newer.name.clone())
                .collect();
            manifest.snapshots.retain(|snapshot| !lost.contains(&snapshot.name));
            truncate(manifest, span);
        }
        for (id, overlay) in &overlays {
            manifest.push_layer(id, &overlay.entry);
        }
        Ok(())
    });
    if let Err(error) = updated {
        for (id, overlay) in &overlays {
            store.remove_layer(id, &overlay.entry)?;
        }
        return Err(error);
    }
    remove_above(store, &spans)
}

/// One disk's part of a snapshot: the index of the layer that holds it, and what lies above.
struct Span {
    id: String,
    layer: usize,
    above: Vec<LayerEntry>,
}

fn spans(manifest: &Manifest, name: &str) -> Result<Vec<Span>> {
    let mut spans = Vec::new();
    for disk in &manifest.snapshot(name)?.disks {
        let layer = manifest.layer_of(name, &disk.id)?;
        let above = manifest.disk(&disk.id)?.layers[layer + 1..].to_vec();
        spans.push(Span { id: disk.id.clone(), layer, above });
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

fn truncate(manifest: &mut Manifest, span: &Span) {
    if let Some(disk) = manifest.disks.get_mut(&span.id) {
        disk.layers.truncate(span.layer + 1);
    }
}

fn remove_above(store: &Store, spans: &[Span]) -> Result<()> {
    for span in spans {
        span.above.iter().try_for_each(|entry| store.remove_layer(&span.id, entry))?;
    }
    Ok(())
}

/// Writes what `layer` itself holds into `target`. Until the manifest drops `layer` it hides all of that.
fn merge_down(layer: &Layer, target: &Layer) -> Result<()> {
    let Some(image) = layer.image() else { return Ok(()) };
    let (from, to) = (layer.disk(), target.disk());
    let story = || format!("merge {} into {}", layer.entry.path.display(), target.entry.path.display());
    let end = to.capacity().min(from.capacity());
    let (mut offset, mut buffer) = (0, Vec::new());
    while offset < end {
        let chunk = ByteRange { offset, len: CHUNK.min(end - offset) };
        let run = image.run_at(chunk).context(story)?;
        match run.place {
            Place::Absent => {}
            Place::Zero => blocking(|waker| to.write_zeroes(run.range, true, waker)).context(story)?,
            Place::Data(_) => {
                buffer.resize(run.range.len as usize, 0);
                read_disk(&*from, offset, &mut buffer).context(story)?;
                write_disk(&*to, offset, &buffer).context(story)?;
            }
        }
        offset = run.range.end();
        if target.pending() > MAX_PENDING {
            target.flush()?;
        }
    }
    Ok(())
}
