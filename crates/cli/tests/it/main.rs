//! The program as its users and their scripts meet it: the real binary, over loopback, on ports that the system picks.
//!
//! Nothing here waits for a fixed time: tests wait for what they need to see, with a deadline that only a failure meets.

#![cfg(unix)]
#![allow(missing_docs)]

mod acked;
mod bench;
mod config;
mod demo;
mod endpoints;
mod fields;
mod framings;
mod json;
mod limits;
mod listen;
mod manual;
mod metrics;
mod program;
mod readme;
mod reconnect;
mod record;
mod send;
mod spool;
mod tap;
mod terminal;
mod tls;
mod top;
mod usage;
mod wire;
