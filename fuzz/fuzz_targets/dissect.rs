//! What `checks.rs` demands of this parser, for whatever bytes the fuzzer invents.

#![no_main]

#[path = "../../crates/buffstreams/src/proto/mod.rs"]
mod proto;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| proto::checks::dissect(bytes));
