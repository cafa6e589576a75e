//! From what was asked to the layers it takes: pure functions of the manifest.

use std::collections::BTreeSet;
use std::path::Path;

use block::{Error, ErrorKind, Result};

use super::record::{Direction, Move, Task};
use crate::manifest::{LayerEntry, Manifest};

/// Neighbouring layers of a disk that become one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Segment {
    pub(crate) disk: String,
    /// The lowest first; two at least.
    pub(crate) layers: Vec<LayerEntry>,
    /// `None`: whichever copies less.
    pub(crate) direction: Option<Direction>,
    /// Whether the highest of them is the disk's last one.
    pub(crate) with_last: bool,
}

/// What a task takes of each disk, as the chains are now. Disks of which nothing has to be merged are not listed.
pub(crate) fn plan(manifest: &Manifest, task: &Task) -> Result<Vec<Segment>> {
    match task {
        Task::Commit { disk, base, top, .. } => {
            let bottom = index_of(manifest, disk, *base)?;
            let segment = segment(manifest, disk, bottom, index_of(manifest, disk, *top)?, &[])?;
            Ok(vec![Segment { direction: Some(Direction::Down), ..segment }])
        }
        Task::Stream { disk, base, top } => {
            let bottom = base.map_or(Ok(0), |base| index_of(manifest, disk, base).map(|base| base + 1))?;
            let segment = segment(manifest, disk, bottom, index_of(manifest, disk, *top)?, &[])?;
            Ok(vec![Segment { direction: Some(Direction::Up), ..segment }])
        }
        Task::Merge { disk, lowest, highest } => {
            let (low, high) = (index_of(manifest, disk, *lowest)?, index_of(manifest, disk, *highest)?);
            Ok(vec![segment(manifest, disk, low, high, &[])?])
        }
        Task::Delete { snapshot } => {
            let ids: Vec<_> = manifest.snapshot(snapshot)?.disks.iter().map(|disk| disk.id.clone()).collect();
            ids.iter().filter_map(|id| around(manifest, snapshot, id).transpose()).collect()
        }
    }
}

/// The same for a job whose first byte may have been written: what it then was about to do.
pub(crate) fn replan(manifest: &Manifest, moves: &[Move], task: &Task) -> Result<Vec<Segment>> {
    let doomed = doomed(task);
    let again = |one: &Move| {
        let (low, high) =
            (index_of(manifest, &one.disk, one.lowest)?, index_of(manifest, &one.disk, one.highest)?);
        let segment = segment(manifest, &one.disk, low, high, &doomed)?;
        Ok(Segment { direction: Some(one.direction), ..segment })
    };
    moves.iter().map(again).collect()
}

/// The snapshots that the task does away with.
pub(crate) fn doomed(task: &Task) -> Vec<&str> {
    match task {
        Task::Delete { snapshot } => vec![snapshot],
        _ => Vec::new(),
    }
}

/// What is merged when a disk's part of a snapshot goes: the layer that held it, with those beneath that hold none, into
/// one with the next layer above that holds one, or with all above. `None` if there is nothing to merge.
fn around(manifest: &Manifest, snapshot: &str, disk: &str) -> Result<Option<Segment>> {
    let at = manifest.layer_of(snapshot, disk)?;
    let held = holders(manifest, disk, &[snapshot]);
    let layers = &manifest.disk(disk)?.layers;
    let last = layers.len() - 1;
    if at == last || held.contains(&at) {
        return Ok(None);
    }
    let low = (0..at).rev().take_while(|index| !held.contains(index)).last().unwrap_or(at);
    let high = (at + 1..last).find(|index| held.contains(index)).unwrap_or(last);
    segment(manifest, disk, low, high, &[snapshot]).map(Some)
}

/// Layers without snapshots that can be merged of themselves: with the next one above if that is frozen as well, else
/// among themselves. One that lies alone beneath the active layer stays: it would be merged into one that lies there.
pub(crate) fn tidy(manifest: &Manifest, disk: &str) -> Option<Task> {
    let layers = &manifest.disk(disk).ok()?.layers;
    let held = holders(manifest, disk, &[]);
    let last = layers.len() - 1;
    let mut low = 0;
    while low < last {
        let free = (low..last).take_while(|index| !held.contains(index)).count();
        let high = (low + free).min(if low + free == last { last - 1 } else { last });
        if free > 0 && high > low {
            let (lowest, highest) = (layers.get(low)?.number, layers.get(high)?.number);
            return Some(Task::Merge { disk: disk.to_owned(), lowest, highest });
        }
        low += free + 1;
    }
    None
}

fn segment(manifest: &Manifest, disk: &str, low: usize, high: usize, doomed: &[&str]) -> Result<Segment> {
    let layers = &manifest.disk(disk)?.layers;
    let chosen = layers.get(low..=high).unwrap_or_default();
    if chosen.len() < 2 {
        let story =
            format!("there is nothing to merge: of disk {disk}, one layer at least must lie on another");
        return Err(Error::new(ErrorKind::InvalidInput, story));
    }
    let held = holders(manifest, disk, doomed);
    if let Some(index) = (low..high).find(|index| held.contains(index)) {
        let path = layers.get(index).map_or(Path::new(""), |layer| &layer.path);
        if layers.get(index).is_some_and(|layer| manifest.is_pinned(disk, layer.number)) {
            let story = format!("{} is being read as it was at an instant: try again later", path.display());
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let names: Vec<_> = manifest.held_by(disk, path).map(|snapshot| snapshot.name.as_str()).collect();
        let story = format!(
            "{} holds snapshot '{}', which would be lost: delete it",
            path.display(),
            names.join("', '")
        );
        return Err(Error::new(ErrorKind::Busy, story));
    }
    let (disk, with_last) = (disk.to_owned(), high + 1 == layers.len());
    Ok(Segment { disk, layers: chosen.to_vec(), direction: None, with_last })
}

/// The indices of layers that hold a snapshot, `but` some, or are read as if they did.
fn holders(manifest: &Manifest, disk: &str, but: &[&str]) -> BTreeSet<usize> {
    let layers = manifest.disks.get(disk).map_or(&[][..], |disk| &disk.layers);
    let holds = |layer: &LayerEntry| {
        manifest.is_pinned(disk, layer.number)
            || manifest.held_by(disk, &layer.path).any(|snapshot| !but.contains(&snapshot.name.as_str()))
    };
    layers.iter().enumerate().filter(|(_, layer)| holds(layer)).map(|(index, _)| index).collect()
}

pub(crate) fn index_of(manifest: &Manifest, disk: &str, number: u32) -> Result<usize> {
    manifest.disk(disk)?.layers.iter().position(|layer| layer.number == number).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("layer {number} of disk {disk} is not there any more"))
    })
}
