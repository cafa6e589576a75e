#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| guest_agent::fuzz::agent_replies(data));
