//! The qcow2 image format: codec, mapping, allocation, refcounts, journal.
