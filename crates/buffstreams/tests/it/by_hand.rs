//! Acknowledged streams spoken by hand, from what PROTOCOL.md says and from nothing in the library: what a stranger sends, or
//! another implementation.

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::support::in_time;

pub(crate) const PREFACE: &[u8] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS\x01";

/// The maximum message size that is asked for here: with it, prefixes have three bytes before WELCOME and behind it.
pub(crate) const MAXIMUM: u64 = 4096;

/// The kinds of control frames.
pub(crate) const WELCOME: u8 = 2;
pub(crate) const REFUSE: u8 = 3;
pub(crate) const ACK: u8 = 4;
pub(crate) const REJECT: u8 = 5;
pub(crate) const CONFIRM_REJECT: u8 = 6;
pub(crate) const HEARTBEAT: u8 = 7;
pub(crate) const GOODBYE: u8 = 8;
pub(crate) const CONFIRM_GOODBYE: u8 = 9;
pub(crate) const SKIP: u8 = 10;

/// The refusal of an epoch that is known.
pub(crate) const EPOCH: u16 = 0x8001;

fn prefix(zigzag: u32) -> [u8; 3] {
    assert!(zigzag < 1 << 21);
    match zigzag {
        0..0x80 => [zigzag as u8, 0, 0],
        0x80..0x4000 => [zigzag as u8 | 0x80, (zigzag >> 7) as u8, 0],
        _ => [zigzag as u8 | 0x80, (zigzag >> 7) as u8 | 0x80, (zigzag >> 14) as u8],
    }
}

/// A message in its frame.
pub(crate) fn message(bytes: &[u8]) -> Vec<u8> {
    [&prefix(2 * bytes.len() as u32)[..], bytes].concat()
}

/// A control frame: its kind, and what stands behind that.
pub(crate) fn control(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let fields = fields.concat();
    [&prefix(2 * (fields.len() as u32 + 1) - 1)[..], &[kind], &fields].concat()
}

/// A control frame that has a number.
pub(crate) fn numbered(kind: u8, number: u64) -> Vec<u8> {
    control(kind, &[&number.to_be_bytes()])
}

/// HELLO, of a stream without a token.
pub(crate) fn hello(stream: [u8; 16], epoch: u64, first: u64, window: u64, heartbeat_ms: u32) -> Vec<u8> {
    let reply_window = 1 << 16;
    let numbers = [epoch, first, MAXIMUM, window, reply_window].map(u64::to_be_bytes);
    control(1, &[&[1, 1], &stream, numbers.as_flattened(), &heartbeat_ms.to_be_bytes(), &[0, 0]])
}

/// WELCOME.
pub(crate) fn welcome(state: [u8; 16], dispatched: u64, committed: u64, window: u64, heartbeat_ms: u32) -> Vec<u8> {
    let numbers = [dispatched, committed, window].map(u64::to_be_bytes);
    control(WELCOME, &[&[1], &state, numbers.as_flattened(), &heartbeat_ms.to_be_bytes()])
}

/// What stands in a WELCOME of interest here: dispatched, and committed.
pub(crate) fn stand(frame: &[u8]) -> (u64, u64) {
    let number = |at: usize| u64::from_be_bytes(frame[at..at + 8].try_into().unwrap());
    (number(18), number(26))
}

/// The next control frame, without its prefix; `None` at the end of the stream.
pub(crate) async fn hear(socket: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    in_time("a frame comes", async {
        let mut prefix = [0; 3];
        socket.read_exact(&mut prefix).await.ok()?;
        let zigzag = prefix.iter().rev().fold(0, |sum, byte| sum << 7 | u32::from(byte & 0x7f));
        assert_eq!(zigzag % 2, 1, "a control frame is expected");
        let mut frame = vec![0; (zigzag as usize).div_ceil(2)];
        socket.read_exact(&mut frame).await.ok()?;
        Some(frame)
    })
    .await
}
