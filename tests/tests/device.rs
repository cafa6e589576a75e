//! The device, driven without a virtual machine: data, sessions, the gate, and drivers of ill will.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod device {
    mod data;
    mod gate;
    mod hostile;
    mod inflight;
    mod mapped;
    mod messages;
    mod moved;
    mod parked;
    mod resize;
    mod served;
    mod session;
    mod truncated;
    mod wire;
}
