//! Changes of the chain that nobody may be looking at: delete and revert.
//!
//! Both work on the state directory alone, with the disks' images closed. They change the images first where that
//! does not show (a layer that is hidden by what is above it), then the manifest, then remove what it no longer
//! names. A crash in between leaves either manifest, with images of which the disks read the same. What a merge
//! spoils is the snapshot that is being deleted: the manifest says so before the merge begins.

use std::sync::Arc;

use block::{
    ByteRange, Context, Error, ErrorKind, Layer as _, Place, Result, blocking, read_disk, write_disk,
};

use crate::layer::{Layer, MAX_PENDING, Opening};
use crate::manifest::{LayerEntry, Manifest};
use crate::model::Grade;
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
    // All is opened before anything changes: an image that is in use is a reason to refuse.
    let chains = spans.iter().map(|span| open_to_merge(store, span)).collect::<Result<Vec<_>>>()?;
    store.update(|manifest| {
        begin_deletion(manifest, name, &spans);
        Ok(())
    })?;
    for layers in &chains {
        merge_all(layers).context(|| "the deletion is not complete, delete the snapshot again")?;
    }
    drop(chains);
    store.update(|manifest| {
        spans.iter().for_each(|span| truncate(manifest, span));
        manifest.forget(name);
        Ok(())
    })?;
    remove_above(store, &spans);
    Ok(())
}

/// The layer that holds the snapshot, open for writing, and those above it.
fn open_to_merge(store: &Store, span: &Span) -> Result<Vec<Arc<Layer>>> {
    let count = span.layer + 1 + span.above.len();
    let layers = store
        .open_layers(&span.id, count, Opening::OFFLINE, Some(span.layer))
        .context(|| "an export, or another program, may still read the snapshot")?;
    let layers = layers[span.layer..].to_vec();
    let capacity = |layer: &Arc<Layer>| layer.disk().capacity();
    match layers.windows(2).find(|pair| capacity(&pair[0]) != capacity(&pair[1])) {
        None => Ok(layers),
        Some(pair) => {
            let [beneath, above] = [0, 1].map(|index| pair[index].entry.path.display());
            let story =
                format!("{beneath} and {above} are not of the same size: somebody has resized one of them");
            Err(Error::new(ErrorKind::Unsupported, story))
        }
    }
}

/// From here on the images of the snapshot hold neither what they held nor yet what the disk shows.
fn begin_deletion(manifest: &mut Manifest, name: &str, spans: &[Span]) {
    manifest.deleting.insert(name.to_owned());
    for snapshot in manifest.snapshots.iter_mut().filter(|snapshot| snapshot.name == name) {
        snapshot.grade = Grade::Crash;
        snapshot.reason = "its deletion was begun, its images hold it no more: delete it again".to_owned();
    }
    for span in spans {
        let layers = manifest.disks.get_mut(&span.id).map(|disk| &mut disk.layers[..]).unwrap_or_default();
        layers.iter_mut().skip(span.layer).take(1).for_each(|target| target.sealed = false);
    }
}

/// Merges all layers into the first.
fn merge_all(layers: &[Arc<Layer>]) -> Result<()> {
    let Some((target, above)) = layers.split_first() else { return Ok(()) };
    above.iter().try_for_each(|layer| merge_down(layer, target))?;
    target.flush()
}

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
        store.update(|manifest| {
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

fn remove_above(store: &Store, spans: &[Span]) {
    for span in spans {
        span.above.iter().for_each(|entry| store.discard(&span.id, entry));
    }
}

/// Writes what `layer` itself holds into `target`. Until the manifest drops `layer` it hides all of that.
fn merge_down(layer: &Layer, target: &Layer) -> Result<()> {
    let Some(image) = layer.image() else { return Ok(()) };
    let (from, to) = (layer.disk(), target.disk());
    let story = || format!("merge {} into {}", layer.entry.path.display(), target.entry.path.display());
    let end = from.capacity();
    let (mut offset, mut buffer) = (0, Vec::new());
    while offset < end {
        let chunk = ByteRange { offset, len: CHUNK.min(end - offset) };
        let run = image.run_at(chunk).context(story)?;
        match run.place {
            Place::Absent => {}
            Place::Zero => blocking(|waker| to.write_zeroes(run.range, true, waker)).context(story)?,
            Place::Data(_) | Place::Packed => {
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
