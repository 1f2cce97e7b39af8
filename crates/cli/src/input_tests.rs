//! Every way to cut an input into reads must give the same messages, and the same complaints.

use super::*;

const MAX: usize = 8;

fn json() -> args::Input {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gtfs-realtime/gtfs-realtime.proto");
    args::Input::Json(Schema::load(&[file.into()], &[], "transit_realtime.FeedHeader").unwrap())
}

/// What comes out of `input` cut into reads of `step` bytes: messages as they are, the rest as its report.
async fn all(format: args::Input, input: &[u8], step: usize) -> Vec<Result<Vec<u8>, (String, Option<Vec<u8>>)>> {
    let (chunks, receiver) = mpsc::channel(input.len() + 1);
    for chunk in input.chunks(step) {
        chunks.try_send(Ok(Bytes::copy_from_slice(chunk))).unwrap();
    }
    drop(chunks);
    let mut messages = Messages::new(receiver, format, MAX, true);
    let mut items = Vec::new();
    while let Some(item) = messages.next().await.unwrap() {
        items.push(match item {
            Item::Message(message) => Ok(message.to_vec()),
            Item::Unsendable(unsendable) => {
                let report = unsendable.to_string();
                Err((
                    report,
                    match unsendable.content {
                        Content::None => None,
                        Content::Held(bytes) => Some(bytes),
                        Content::Spilled(mut file, length) => {
                            let mut bytes = Vec::new();
                            file.read_to_end(&mut bytes).unwrap();
                            assert_eq!(bytes.len() as u64, length);
                            Some(bytes)
                        }
                    },
                ))
            }
        });
    }
    items
}

/// The same for every way to cut the input into equal reads, which must make no difference.
async fn every_cut(format: args::Input, input: &[u8]) -> Vec<Result<Vec<u8>, (String, Option<Vec<u8>>)>> {
    let whole = all(format.clone(), input, input.len().max(1)).await;
    for step in 1..input.len() {
        assert_eq!(all(format.clone(), input, step).await, whole, "{step} bytes at a time");
    }
    whole
}

fn message(bytes: &[u8]) -> Result<Vec<u8>, (String, Option<Vec<u8>>)> {
    Ok(bytes.to_vec())
}

fn unsendable(report: &str, bytes: Option<&[u8]>) -> Result<Vec<u8>, (String, Option<Vec<u8>>)> {
    Err((report.to_owned(), bytes.map(<[u8]>::to_vec)))
}

#[tokio::test]
async fn a_line_is_what_stands_before_its_newline() {
    let items = every_cut(args::Input::Lines, b"one\n\ntwo\r\n\0\xff\n12345678\nlast").await;
    let messages: [&[u8]; 6] = [b"one", b"", b"two\r", b"\0\xff", b"12345678", b"last"];
    assert_eq!(items, messages.map(message));
}

#[tokio::test]
async fn no_input_is_no_message_and_a_newline_alone_is_an_empty_one() {
    assert_eq!(every_cut(args::Input::Lines, b"").await, []);
    assert_eq!(every_cut(args::Input::Lines, b"\n").await, [message(b"")]);
    assert_eq!(every_cut(args::Input::Lines, b"a\n").await, [message(b"a")]);
}

#[tokio::test]
async fn a_line_over_the_maximum_is_reported_with_its_length_and_its_bytes_and_passed_over() {
    let items = every_cut(args::Input::Lines, b"123456789\nok\n12345678901234567890").await;
    assert_eq!(
        items,
        [
            unsendable("line 1: a message of 9 bytes; the maximum is 8 (--max-message-size)", Some(b"123456789")),
            message(b"ok"),
            unsendable(
                "line 3: a message of 20 bytes; the maximum is 8 (--max-message-size)",
                Some(b"12345678901234567890")
            ),
        ]
    );
}

#[tokio::test]
async fn hex_is_read_in_either_case_and_an_empty_line_is_an_empty_message() {
    let items = every_cut(args::Input::Hex, b"00fF\n\n0102030405060708\nab").await;
    let messages: [&[u8]; 4] = [b"\x00\xff", b"", b"\x01\x02\x03\x04\x05\x06\x07\x08", b"\xab"];
    assert_eq!(items, messages.map(message));
}

#[tokio::test]
async fn bad_hex_is_reported_whatever_its_length() {
    let items =
        every_cut(args::Input::Hex, b"0g\n0\n00\r\n010203040506070809\n0102030405060708091\n01020304050607080z09\nff")
            .await;
    assert_eq!(
        items,
        [
            unsendable("line 1: not hex: byte 'g' is no digit", None),
            unsendable("line 2: not hex: an odd number of digits", None),
            unsendable("line 3: not hex: byte '\\r' is no digit", None),
            unsendable(
                "line 4: a message of 9 bytes; the maximum is 8 (--max-message-size)",
                Some(b"\x01\x02\x03\x04\x05\x06\x07\x08\x09")
            ),
            unsendable("line 5: not hex: an odd number of digits", None),
            unsendable("line 6: not hex: byte 'z' is no digit", None),
            message(b"\xff"),
        ]
    );
}

#[tokio::test]
async fn json_that_does_not_fit_is_reported_and_blank_lines_are_skipped() {
    let input = b"{\"gtfsRealtimeVersion\":\"2.0\"}\n\n \r\n{\"gtfs\":1}\n{\"gtfsRealtimeVersion\":\"1234567\"}\n{}";
    let items = every_cut(json(), input).await;
    assert_eq!(items[0], message(b"\x0a\x032.0"));
    let report = &items[1].as_ref().unwrap_err().0;
    assert!(report.starts_with("line 4: not a transit_realtime.FeedHeader: "), "{report}");
    assert_eq!(
        items[2],
        unsendable("line 5: a message of 9 bytes; the maximum is 8 (--max-message-size)", Some(b"\x0a\x071234567"))
    );
    assert_eq!(items[3..], [message(b"")]);
}

#[tokio::test]
async fn json_is_not_gathered_beyond_what_the_maximum_allows_for_its_text() {
    let mut input = vec![b' '; JSON_TEXT_AT_LEAST];
    input.extend_from_slice(b"{}\n{}\n");
    let items = all(json(), &input, 4096).await;
    assert_eq!(items[0].as_ref().unwrap_err().1, None);
    assert!(items[0].as_ref().unwrap_err().0.starts_with("line 1: 1048578 bytes of JSON; "));
    assert_eq!(items[1..], [message(b"")]);
}

#[tokio::test]
async fn delimited_messages_are_what_their_lengths_say() {
    let items = every_cut(args::Input::Delimited, b"\x03one\x00\x01\n\x0912345678\x09\x0812345678").await;
    assert_eq!(
        items,
        [
            message(b"one"),
            message(b""),
            message(b"\n"),
            unsendable("message 4: a message of 9 bytes; the maximum is 8 (--max-message-size)", Some(b"12345678\x09")),
            message(b"12345678"),
        ]
    );
}

#[tokio::test]
async fn delimited_input_that_ends_early_is_reported() {
    let inside = every_cut(args::Input::Delimited, b"\x01a\x05abc").await;
    assert_eq!(inside, [message(b"a"), unsendable("message 2: the input ends 3 bytes into a message of 5", None)]);
    let overlong = every_cut(args::Input::Delimited, b"\xe8\x07abc").await;
    assert_eq!(overlong, [unsendable("message 1: the input ends 3 bytes into a message of 1000", None)]);
    let length = every_cut(args::Input::Delimited, b"\x01a\x85").await;
    assert_eq!(length, [message(b"a"), unsendable("message 2: the input ends inside the length before it", None)]);
}

#[tokio::test]
async fn a_malformed_length_ends_the_input() {
    for malformed in [&b"\x80\x00"[..], b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", &[0x80; 10]] {
        let (chunks, receiver) = mpsc::channel(1);
        chunks.try_send(Ok(Bytes::from([b"\x01a", malformed, b"\x01b"].concat()))).unwrap();
        drop(chunks);
        let mut messages = Messages::new(receiver, args::Input::Delimited, MAX, true);
        assert!(matches!(messages.next().await, Ok(Some(Item::Message(b"a")))));
        assert!(matches!(messages.next().await, Ok(Some(Item::Unsendable(_)))));
        assert!(matches!(messages.next().await, Ok(None)));
    }
}

#[tokio::test]
async fn a_read_error_comes_after_what_was_read() {
    let (chunks, receiver) = mpsc::channel(2);
    chunks.try_send(Ok(Bytes::from_static(b"one\ntw"))).unwrap();
    chunks.try_send(Err(io::Error::other("the disk is gone"))).unwrap();
    let mut messages = Messages::new(receiver, args::Input::Lines, MAX, false);
    assert!(matches!(messages.next().await, Ok(Some(Item::Message(b"one")))));
    assert!(messages.next().await.is_err());
}

#[tokio::test]
async fn reading_passes_on_everything_in_order() {
    let input: Vec<u8> = (0..3 * CHUNK + 5).map(|index| (index % 251) as u8).collect();
    let mut chunks = read(io::Cursor::new(input.clone()));
    let mut output = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        output.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(output, input);
}
