//! The protobuf message of the typed cases, 110 bytes once encoded: owned, as prost has it, and as buffa's views.

/// What buffa generates from `note/note.proto`.
#[allow(clippy::all, elided_lifetimes_in_paths, missing_debug_implementations, unreachable_pub, unused_imports)]
#[rustfmt::skip]
pub(crate) mod views;

pub(crate) const NAME: &str = "buffstreams";
pub(crate) const COMMENT: &str =
    "ships length-prefixed messages over TCP and says which of them did not arrive at any rate";
pub(crate) const DATE: i64 = 1_763_000_000;

/// The message for prost.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Note {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(sint64, tag = "2")]
    pub(crate) date: i64,
    #[prost(string, tag = "3")]
    pub(crate) comment: String,
}

/// The message that all systems send.
pub(crate) fn note() -> Note {
    Note { name: NAME.into(), date: DATE, comment: COMMENT.into() }
}

/// What a receiver notes of a message: bytes of its strings, and the sum of its first and last one.
#[inline]
pub(crate) fn seen(name: &str, comment: &str) -> (usize, u64) {
    let first = name.as_bytes().first().copied().unwrap_or_default();
    let last = comment.as_bytes().last().copied().unwrap_or_default();
    (name.len() + comment.len(), u64::from(first) + u64::from(last))
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_message_takes_110_bytes() {
        assert_eq!(note().encoded_len(), 110);
    }

    #[test]
    fn both_kinds_understand_each_other() {
        let encoded = note().encode_to_vec();
        let view = <views::Note as buffa::HasMessageView>::decode_view(&encoded).unwrap();
        assert_eq!((view.name, view.date, view.comment), (NAME, DATE, COMMENT));
    }
}
