//! One program for all targets: `LOCKSTEP_FUZZ` names the one that is run.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::sync::LazyLock;

#[path = "../targets.rs"]
mod targets;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("LOCKSTEP_FUZZ").expect("LOCKSTEP_FUZZ names a target");
    let found = targets::ALL.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("there is no target '{name}'")).1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
