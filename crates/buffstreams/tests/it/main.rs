//! The library over real sockets: loopback, port 0, and waiting for conditions instead of for time.

mod allocations;
mod architecture;
mod blocking;
mod codec;
mod connection;
mod hostile;
mod lifecycle;
mod manager;
mod receive;
mod sessions;
mod support;
mod typed;
