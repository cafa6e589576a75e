#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhost_blk::fuzz::vhost_user_messages(data));
