#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2::fuzz::journal(data));
