//! `frazil chain`: the layers of disks, and the jobs that merge them.

use serde_json::json;
use snapshot::{CommitRequest, DiskLayer, DiskStatus, StreamRequest};

use super::jobs::{follow, options};
use super::print::{decode, show_or_json};
use super::table;
use super::via::{Connection, Via};
use crate::cli::Chain;
use crate::failure::Failure;

/// `frazil chain …`.
pub(crate) fn chain(command: Chain) -> Result<(), Failure> {
    match command {
        Chain::List { daemon, output } => {
            let what = "list the layers";
            let status = Connection::open(&daemon)?.ask(what, "query-frazil", json!({}))?;
            let disks: Vec<DiskStatus> = decode(what, &status["disks"])?;
            // The active layer of each disk first.
            let layers: Vec<_> = disks.iter().flat_map(|disk| disk.layers.iter().rev()).collect();
            show_or_json(output, &json!(layers), |layers: &Vec<DiskLayer>| table::layers(layers))
        }
        Chain::Commit { disk, base, top, job, place } => {
            let ((base, base_node), (top, top_node)) = (layer(base), layer(top));
            let mut via = Via::open(&place)?;
            let options = options(&via, &job);
            let device = disk;
            let request =
                CommitRequest { device, base, base_node, top, top_node, auto_complete: true, options };
            let id = via.commit(request)?;
            follow(&mut via, &id, &job, "committed")
        }
        Chain::Stream { layer: device, base, job, place } => {
            let (base, base_node) = layer(base);
            let mut via = Via::open(&place)?;
            let request = StreamRequest { device, base, base_node, options: options(&via, &job) };
            let id = via.stream(request)?;
            follow(&mut via, &id, &job, "streamed")
        }
    }
}

/// A layer's name as file or as node: only files have a slash in them, and all that the daemon shows do.
fn layer(name: Option<String>) -> (Option<String>, Option<String>) {
    match name {
        Some(name) if name.contains('/') => (Some(name), None),
        node => (None, node),
    }
}
