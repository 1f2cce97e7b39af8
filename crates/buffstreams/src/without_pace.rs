//! What stands in for `pace.rs` in a library that is built without it: a type of which there is no value.

use std::num::NonZeroU32;
use std::task::{Context, Poll};

#[derive(Debug)]
pub(crate) enum Pace {}

impl Pace {
    pub(crate) fn new(_: NonZeroU32) -> Pace {
        unreachable!("a pace cannot be asked for")
    }

    pub(crate) fn batch(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn handled(&mut self, _: u64) {
        match *self {}
    }

    pub(crate) fn is_owed(&self) -> bool {
        match *self {}
    }

    pub(crate) fn is_waiting(&self) -> bool {
        match *self {}
    }

    pub(crate) fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<()> {
        match *self {}
    }
}
