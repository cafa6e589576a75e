//! Client of the QEMU guest agent.
