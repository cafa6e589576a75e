//! Conformance, crash and protocol suites that need no virtual machine.
