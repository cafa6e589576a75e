//! What a transaction does with bitmaps: those of disks change with the cut, those of nodes after it.

use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{BitmapName, DEFAULT_GRANULARITY, MarkChange, Pin};

use super::{Plan, Source, invalid};
use crate::model::{BitmapAdd, BitmapMerge, BitmapRef, BitmapSource};
use crate::nodes::{Access, NodeBitmaps, no_node, not_found, tidy};

pub(super) type Staged = (Arc<Access>, NodeBitmaps);

/// A bitmap of a node that is to change.
pub(super) struct NodeChange {
    pub(super) access: Arc<Access>,
    pub(super) name: String,
    pub(super) to: To,
}

pub(super) enum To {
    Added { granularity: u32 },
    Removed,
    Clean,
    Merged(Vec<BitmapRef>),
}

impl Plan<'_> {
    pub(super) fn add_bitmap(&mut self, add: BitmapAdd) -> Result<()> {
        let granularity = add.granularity.unwrap_or(DEFAULT_GRANULARITY);
        match self.owner(&add.node)? {
            Source::Disk(disk) => {
                let bitmap = BitmapName { disk, name: add.name };
                let (persistent, recording) = (add.persistent, !add.disabled);
                self.changes.push(MarkChange::Add { bitmap, granularity, persistent, recording });
            }
            Source::Access(access) => {
                if !granularity.is_power_of_two() || granularity < 512 {
                    return Err(invalid("Granularity must be power of 2 and at least 512"));
                }
                self.node_changes.push(NodeChange { access, name: add.name, to: To::Added { granularity } });
            }
        }
        Ok(())
    }

    /// What a bitmap is of that is there already.
    fn bitmap_owner(&self, node: &str) -> Result<Source> {
        self.owner(node).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("Node '{node}' not found")),
            _ => error,
        })
    }

    /// A change that takes a bitmap's name and nothing else. `to` is what it is for a node's; `None` for nothing.
    pub(super) fn change(
        &mut self,
        bitmap: BitmapRef,
        of_disk: fn(BitmapName) -> MarkChange,
        to: Option<To>,
    ) -> Result<()> {
        match self.bitmap_owner(&bitmap.node)? {
            Source::Disk(disk) => self.changes.push(of_disk(BitmapName { disk, name: bitmap.name })),
            Source::Access(access) => {
                self.node_changes.extend(to.map(|to| NodeChange { access, name: bitmap.name, to }));
            }
        }
        Ok(())
    }

    pub(super) fn merge(&mut self, merge: BitmapMerge) -> Result<()> {
        let node = merge.node;
        let source = |source| match source {
            BitmapSource::Local(name) => BitmapRef { node: node.clone(), name },
            BitmapSource::External(bitmap) => bitmap,
        };
        let sources: Vec<_> = merge.bitmaps.into_iter().map(source).collect();
        match self.bitmap_owner(&node)? {
            Source::Disk(disk) => {
                let named = |source: BitmapRef| match self.bitmap_owner(&source.node)? {
                    Source::Disk(disk) => Ok(BitmapName { disk, name: source.name }),
                    Source::Access(_) => Err(Error::new(
                        ErrorKind::Unsupported,
                        "a node's bitmap can not be merged into one of a disk",
                    )),
                };
                let sources = sources.into_iter().map(named).collect::<Result<_>>()?;
                self.changes
                    .push(MarkChange::Merge { target: BitmapName { disk, name: merge.target }, sources });
            }
            Source::Access(access) => {
                // Read at the cut.
                self.need(&access.filter);
                let to = To::Merged(sources);
                self.node_changes.push(NodeChange { access, name: merge.target, to });
            }
        }
        Ok(())
    }

    /// A bitmap that is cleaned along with a backup of its disk tells afterwards what this backup lacks. So it becomes clean
    /// when the backup has succeeded, at the instant that was copied: should the job fail or die with the daemon, the next
    /// increment still has all that changed since the backup before. Until then the job uses it.
    pub(super) fn defer_clears(&mut self) -> Result<()> {
        let mentions = |change: &MarkChange, name: &BitmapName| match change {
            MarkChange::Checkpoint { .. } => false,
            MarkChange::Add { bitmap, .. } => bitmap == name,
            MarkChange::Remove(bitmap) | MarkChange::Clear(bitmap) => bitmap == name,
            MarkChange::Enable(bitmap) | MarkChange::Disable(bitmap) => bitmap == name,
            MarkChange::Merge { target, sources } => target == name || sources.contains(name),
        };
        let is_backed_up = |disk: &str| self.ready.iter().any(|ready| ready.copies(disk));
        let deferred = self.changes.iter().filter_map(|change| match change {
            // What else the transaction does with it would come in the wrong order.
            MarkChange::Clear(name) if is_backed_up(&name.disk) => {
                (self.changes.iter().filter(|other| mentions(other, name)).count() == 1).then(|| name.clone())
            }
            _ => None,
        });
        for name in deferred.collect::<Vec<_>>() {
            let lock = self.backups.manager.bitmap_lock(&name.disk, &name.name)?;
            self.changes.retain(|change| !mentions(change, &name));
            self.cleaned.push((name, lock));
        }
        Ok(())
    }

    /// The bitmaps of nodes as they will be. `pins` are the disks at the cut.
    pub(super) fn stage(&self, pins: &[&Pin]) -> Result<Vec<Staged>> {
        let mut staged: Vec<Staged> = Vec::new();
        for NodeChange { access, name, to } in &self.node_changes {
            let merged = match to {
                To::Merged(sources) => self.merged(access, sources, pins, &staged)?,
                _ => Vec::new(),
            };
            let place = staged.iter().position(|(known, _)| Arc::ptr_eq(known, access));
            let place = place.unwrap_or_else(|| {
                staged.push((Arc::clone(access), access.bitmaps().clone()));
                staged.len() - 1
            });
            let Some((_, bitmaps)) = staged.get_mut(place) else { continue };
            match to {
                To::Added { .. } if bitmaps.contains_key(name) => {
                    return Err(Error::new(ErrorKind::Busy, format!("Bitmap already exists: {name}")));
                }
                To::Added { granularity } => drop(bitmaps.insert(name.clone(), (*granularity, Vec::new()))),
                To::Removed => drop(bitmaps.remove(name).ok_or_else(|| not_found(name))?),
                To::Clean => entry(bitmaps, name)?.clear(),
                To::Merged(_) => {
                    let dirty = entry(bitmaps, name)?;
                    dirty.extend(merged);
                    tidy(dirty);
                }
            }
        }
        Ok(staged)
    }

    /// What is dirty in any of these bitmaps, at the instant that the node shows.
    fn merged(
        &self,
        access: &Access,
        sources: &[BitmapRef],
        pins: &[&Pin],
        staged: &[Staged],
    ) -> Result<Vec<ByteRange>> {
        let own = access.filter.view().pin.clone();
        let cut = pins.iter().copied().find(|pin| pin.id() == access.filter.disk);
        let pin = cut.or(own.as_deref()).ok_or_else(|| no_node(&access.filter.disk))?;
        let mut merged = Vec::new();
        for source in sources {
            match self.bitmap_owner(&source.node)? {
                Source::Disk(disk) => {
                    let own = |(name, _): &&(BitmapName, _)| name.disk == disk && name.name == source.name;
                    let dirty = match self.cleaned.iter().find(own) {
                        Some((_, lock)) => lock.dirty(pin)?,
                        None => self.backups.manager.bitmap_lock(&disk, &source.name)?.dirty(pin)?,
                    };
                    merged.extend(ranges(&dirty));
                }
                Source::Access(other) => {
                    let known = staged.iter().find(|(known, _)| Arc::ptr_eq(known, &other));
                    let bitmaps =
                        known.map_or_else(|| other.bitmaps().clone(), |(_, bitmaps)| bitmaps.clone());
                    merged.extend(&bitmaps.get(&source.name).ok_or_else(|| not_found(&source.name))?.1);
                }
            }
        }
        Ok(merged)
    }
}

fn entry<'a>(bitmaps: &'a mut NodeBitmaps, name: &str) -> Result<&'a mut Vec<ByteRange>> {
    bitmaps.get_mut(name).map(|(_, dirty)| dirty).ok_or_else(|| not_found(name))
}

fn ranges(bitmap: &DirtyBitmap) -> impl Iterator<Item = ByteRange> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = ByteRange { offset: at, len: bitmap.capacity().checked_sub(at)? };
        let found = bitmap.next_dirty(rest)?;
        at = found.end();
        Some(found)
    })
}
