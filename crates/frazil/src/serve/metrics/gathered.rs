//! What is served: gathered anew for each scrape.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use block::{Kind, LATENCY_BUCKETS, Stats, Tally};
use control::{DaemonStatus, Service};
use hostio::Held;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use snapshot::{DiskStatus, JobInfo};

use super::cuts::{Cuts, Times};

/// Whom to ask.
pub(super) struct Gathered {
    pub(super) service: Arc<dyn Service>,
    pub(super) cuts: Arc<Mutex<Cuts>>,
}

impl fmt::Debug for Gathered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathered").finish_non_exhaustive()
    }
}

/// A metric's samples: the labels of each, and its value.
type Samples<'a, T> = Vec<(Vec<(&'static str, &'a str)>, T)>;

impl Collector for Gathered {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        out.daemon(&self.service.status(), self.service.exports().len())?;
        out.disks(&self.service.disks())?;
        out.requests(&self.service.stats())?;
        out.jobs(&self.service.jobs())?;
        out.cuts(&self.cuts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn daemon(&mut self, status: &DaemonStatus, exports: usize) -> fmt::Result {
        let held = |held: Held| u64::from(matches!(held, Held::Full | Held::Partial));
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        self.0
            .encode_descriptor("build", "What this daemon is", None, MetricType::Info)?
            .encode_info(&version)?;
        self.gauge("uptime_seconds", "Time since the daemon began to serve", status.uptime)?;
        self.gauge("free_bytes", "Room left where overlays grow", status.free)?;
        self.gauge("snapshots", "Snapshots that there are", status.snapshots)?;
        let prepared = u64::from(status.prepared.is_some());
        self.gauge("snapshot_prepared", "Whether a snapshot waits for its release", prepared)?;
        let owed = u64::from(status.thaw_owed);
        self.gauge("thaw_owed", "Whether a guest may be frozen and has not confirmed a thaw", owed)?;
        self.gauge("nbd_exports", "What is offered over NBD", exports as u64)?;
        self.gauge("nbd_clients", "Clients that are connected over NBD", status.nbd_clients)?;
        let parts = [("landlock", status.sandbox.landlock), ("seccomp", status.sandbox.seccomp)];
        let parts = parts.map(|(part, state)| (vec![("part", part)], held(state)));
        self.gauges("sandbox", "Whether this part of the sandbox is in force", parts.into())
    }

    fn disks(&mut self, disks: &[DiskStatus]) -> fmt::Result {
        let mut each = |name: &str, help: &str, value: &dyn Fn(&DiskStatus) -> u64| {
            let samples = disks.iter().map(|disk| (vec![("disk", disk.id.as_str())], value(disk))).collect();
            self.gauges(name, help, samples)
        };
        each("disk_capacity_bytes", "The disk's size", &|disk| disk.capacity)?;
        each("disk_connected", "Whether a front-end is connected", &|disk| disk.connected.into())?;
        each("disk_parked_requests", "Requests that wait for the host", &|disk| disk.parked)?;
        each("disk_in_flight_requests", "Requests taken from the rings and not answered", &|disk| {
            disk.in_flight
        })?;
        each("disk_layers", "Length of the chain", &|disk| disk.layers.len() as u64)?;
        each("disk_active_layer_allocated_bytes", "What the active layer takes on the host", &|disk| {
            disk.layers.last().and_then(|layer| layer.actual_size).unwrap_or_default()
        })?;
        each("disk_allocated_bytes", "What all layers take on the host", &|disk| {
            disk.layers.iter().filter_map(|layer| layer.actual_size).sum()
        })
    }

    fn requests(&mut self, disks: &[(String, Stats)]) -> fmt::Result {
        let each =
            || disks.iter().flat_map(|(id, stats)| Kind::ALL.map(|kind| (id.as_str(), kind, stats.of(kind))));
        let labels = |id, kind: Kind| vec![("disk", id), ("kind", kind.word())];
        let results = |(id, kind, tally): (_, _, Tally)| {
            [("done", tally.done), ("failed", tally.failed), ("invalid", tally.invalid)]
                .map(|(result, count)| ([labels(id, kind), vec![("result", result)]].concat(), count))
        };
        self.counters(
            "requests",
            "Requests of guests that were answered",
            each().flat_map(results).collect(),
        )?;
        let bytes = each().map(|(id, kind, tally)| (labels(id, kind), tally.bytes)).collect();
        self.counters("request_bytes", "Bytes of the disk that those requests named that were done", bytes)?;
        let times = each().map(|(id, kind, tally)| (labels(id, kind), Times::of(&tally))).collect();
        let help =
            "Time from the ring to the answer, of a sample; each stands for those since the one before";
        self.histograms("request_duration_seconds", help, times)
    }

    fn jobs(&mut self, jobs: &[JobInfo]) -> fmt::Result {
        let word = |value: serde_json::Result<serde_json::Value>| {
            value.ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
        };
        let mut counts = BTreeMap::<_, u64>::new();
        for job in jobs {
            let kind = word(serde_json::to_value(job.r#type));
            *counts.entry((kind, word(serde_json::to_value(job.status)))).or_default() += 1;
        }
        let labels = |kind, status| vec![("type", kind), ("status", status)];
        let samples =
            counts.iter().map(|((kind, status), count)| (labels(kind.as_str(), status.as_str()), *count));
        self.gauges("jobs", "Jobs that there are", samples.collect())
    }

    fn cuts(&mut self, cuts: &Cuts) -> fmt::Result {
        let taken = [("filesystem", cuts.frozen), ("crash", cuts.crash)];
        let taken = taken.map(|(grade, count)| (vec![("grade", grade)], count)).into();
        self.counters("snapshots_taken", "Snapshots taken since the daemon began", taken)?;
        let alone = |count| vec![(Vec::new(), count)];
        self.counters("snapshots_failed", "Snapshots that were undone", alone(cuts.failed))?;
        self.counters("thaw_retries", "Times that a thaw was not confirmed", alone(cuts.thaws_owed))?;
        self.counters("io_error_events", "Events of requests that the host failed", alone(cuts.io_errors))?;
        let times = [
            ("gate_closed_seconds", "How long cuts kept the gates closed", cuts.gate),
            ("guest_frozen_seconds", "How long cuts kept file systems frozen", cuts.freeze),
            ("cut_longest_wait_seconds", "Longest wait of a request before a gate, of each cut", cuts.wait),
        ];
        times
            .into_iter()
            .try_for_each(|(name, help, times)| self.histograms(name, help, vec![(Vec::new(), times)]))
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.gauges(name, help, vec![(Vec::new(), value)])
    }

    fn gauges(&mut self, name: &str, help: &str, samples: Samples<'_, u64>) -> fmt::Result {
        // Not as a signed number, which is what the crate knows as a whole gauge.
        self.family(name, help, MetricType::Gauge, samples, |out, value| out.encode_gauge(&(value as f64)))
    }

    fn counters(&mut self, name: &str, help: &str, samples: Samples<'_, u64>) -> fmt::Result {
        self.family(name, help, MetricType::Counter, samples, |out, value| {
            out.encode_counter::<NoLabelSet, u64, f64>(&value, None)
        })
    }

    fn histograms(&mut self, name: &str, help: &str, samples: Samples<'_, Times>) -> fmt::Result {
        self.family(name, help, MetricType::Histogram, samples, |out, times| {
            let bound = |at| Tally::bound(at).map_or(f64::INFINITY, |bound| bound.as_secs_f64());
            let buckets: Vec<_> = (0..LATENCY_BUCKETS).map(bound).zip(times.buckets).collect();
            out.encode_histogram::<NoLabelSet>(times.seconds, times.count, &buckets, None)
        })
    }

    fn family<T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: Samples<'_, T>,
        encode: impl Fn(&mut MetricEncoder<'_>, T) -> fmt::Result,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in samples {
            match labels.is_empty() {
                true => encode(&mut encoder, value)?,
                false => encode(&mut encoder.encode_family(&labels)?, value)?,
            }
        }
        Ok(())
    }
}
