//! The QMP server and its commands.
