//! The library over real sockets: loopback, port 0, and waiting for conditions instead of for time.

mod allocations;
mod architecture;
mod blocking;
mod by_hand;
mod codec;
mod connection;
mod crowds;
mod endpoints;
mod events;
mod faults;
mod hostile;
#[cfg(unix)]
mod kills;
mod lifecycle;
mod limits;
mod logs;
mod manager;
mod metrics;
mod partition;
mod receive;
mod sessions;
mod spool;
mod spread;
mod strangers;
mod support;
mod tls;
mod typed;
