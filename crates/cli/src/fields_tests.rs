use proptest::prelude::*;
use prost::encoding::encode_varint;

use super::*;

fn shown(message: &[u8]) -> String {
    let mut out = Vec::new();
    put(message, &mut out);
    String::from_utf8(out).unwrap()
}

/// Makes a line into the message again, as protoscope does.
fn written(line: &str) -> Vec<u8> {
    let mut rest = line;
    let message = write_fields(&mut rest, None);
    assert_eq!(rest, "", "left of {line}");
    message
}

fn word<'a>(rest: &mut &'a str) -> &'a str {
    let end = rest.find([' ', '}']).unwrap_or(rest.len());
    let (word, behind) = rest.split_at(end);
    *rest = behind;
    word
}

fn skip(rest: &mut &str, text: &str) -> bool {
    rest.strip_prefix(text).map(|behind| *rest = behind).is_some()
}

fn long_form(rest: &mut &str) -> usize {
    if !skip(rest, "long-form:") {
        return 0;
    }
    let long = word(rest).parse().unwrap();
    assert!(skip(rest, " "));
    long
}

fn put_varint(value: u64, long: usize, out: &mut Vec<u8>) {
    encode_varint(value, out);
    for _ in 0..long {
        *out.last_mut().unwrap() |= 0x80;
        out.push(0);
    }
}

fn write_fields(rest: &mut &str, end: Option<char>) -> Vec<u8> {
    let mut out = Vec::new();
    while !rest.is_empty() && !rest.starts_with(|char| Some(char) == end) {
        skip(rest, " ");
        let long_tag = long_form(rest);
        let (number, behind) = rest.split_once(": ").unwrap();
        *rest = behind;
        let number: u64 = number.parse().unwrap();
        let put = |kind: u64, out: &mut Vec<u8>| put_varint(number << 3 | kind, long_tag, out);
        let long = long_form(rest);
        if skip(rest, "!{") {
            put(3, &mut out);
            out.extend(write_fields(rest, Some('}')));
            assert!(skip(rest, "}"));
            put_varint(number << 3 | 4, 0, &mut out);
        } else if skip(rest, "{") {
            put(2, &mut out);
            let content = if skip(rest, "\"") {
                write_text(rest)
            } else if skip(rest, "`") {
                let (hex, behind) = rest.split_once('`').unwrap();
                *rest = behind;
                const_hex::decode(hex).unwrap()
            } else {
                write_fields(rest, Some('}'))
            };
            assert!(skip(rest, "}"));
            put_varint(content.len() as u64, long, &mut out);
            out.extend(content);
        } else {
            let number = word(rest);
            let whole = |text: &str| match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
                None => text.parse::<i64>().unwrap() as u64,
            };
            if let Some(number) = number.strip_suffix("i32") {
                put(5, &mut out);
                match number.contains('.') {
                    true => out.extend(number.parse::<f32>().unwrap().to_le_bytes()),
                    false => out.extend((whole(number) as u32).to_le_bytes()),
                }
            } else if let Some(number) = number.strip_suffix("i64") {
                put(1, &mut out);
                out.extend(whole(number).to_le_bytes());
            } else if number.contains('.') {
                put(1, &mut out);
                out.extend(number.parse::<f64>().unwrap().to_le_bytes());
            } else {
                put(0, &mut out);
                put_varint(whole(number), long, &mut out);
            }
        }
    }
    out
}

fn write_text(rest: &mut &str) -> Vec<u8> {
    let mut text = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next().unwrap() {
            '"' => break,
            '\\' => text.push(match chars.next().unwrap() {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                char => char,
            }),
            char => text.push(char),
        }
    }
    *rest = chars.as_str();
    text.into_bytes()
}

#[test]
fn each_kind_of_field_is_shown_by_its_number() {
    let cases: &[(&[u8], &str)] = &[
        (b"", ""),
        (b"\x08\x96\x01", "1: 150"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "1: -1"),
        (b"\x12\x07testing", "2: {\"testing\"}"),
        (b"\x12\x00", "2: {}"),
        (b"\x12\x09say \"hi\"\n", "2: {\"say \\\"hi\\\"\\n\"}"),
        ("\x12\x06grün!".as_bytes(), "2: {\"grün!\"}"),
        (b"\x12\x03\x00\xff\x7f", "2: {`00ff7f`}"),
        (b"\x1a\x03\x08\x96\x01", "3: {1: 150}"),
        (b"\x0a\x0b\x0a\x032.0\x18\xfc\x87\xbd\xe4\x04", "1: {1: {\"2.0\"} 3: 1284457468}"),
        (b"\x19\x00\x00\x00\x00\x00\x00\xf8\x3f", "3: 1.5"),
        (b"\x19\x2a\x00\x00\x00\x00\x00\x00\x00", "3: 42i64"),
        (b"\x19\xd6\xff\xff\xff\xff\xff\xff\xff", "3: -42i64"),
        (b"\x19\x88\x77\x66\x55\x44\x33\x22\x71", "3: 0x7122334455667788i64"),
        (b"\x25\x00\x00\xc0\x3f", "4: 1.5i32"),
        (b"\x25\x2a\x00\x00\x00", "4: 42i32"),
        (b"\x2b\x08\x01\x33\x34\x2c\x08\x02", "5: !{1: 1 6: !{}} 1: 2"),
        (b"\x88\x00\x96\x81\x00", "long-form:1 1: long-form:1 150"),
        (b"\x12\x81\x00a", "2: long-form:1 {\"a\"}"),
    ];
    for (message, line) in cases {
        assert_eq!(shown(message), *line);
        assert_eq!(written(line), *message, "{line}");
    }
}

#[test]
fn what_is_no_message_is_shown_as_bytes() {
    for (bytes, line) in [
        (&b"hello"[..], "not protobuf: \"hello\""),
        (b"\x00", "not protobuf: `00`"),
        (b"\x08", "not protobuf: `08`"),
        (b"\x12\x05abc", "not protobuf: `1205616263`"),
        (b"\x0b\x08\x01", "not protobuf: `0b0801`"),
        (b"\x0b\x14", "not protobuf: `0b14`"),
        (b"\x0c", "not protobuf: `0c`"),
        (b"\x0e\x01", "not protobuf: `0e01`"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", "not protobuf: `08ffffffffffffffffff02`"),
    ] {
        assert_eq!(shown(bytes), line);
    }
}

#[test]
fn text_that_could_be_fields_is_text_unless_its_lengths_fit() {
    // 0x70 and 0x31 are field 14 with 49.
    assert_eq!(shown(b"\x0a\x02p1"), "1: {\"p1\"}");
    // A tag and a length that are printable too.
    let inner = [&b"\x22\x28"[..], &[b'x'; 40]].concat();
    let message = [&[0x0a, inner.len() as u8][..], &inner].concat();
    assert_eq!(shown(&message), format!("1: {{4: {{\"{}\"}}}}", "x".repeat(40)));
}

#[test]
fn depth_is_bounded() {
    let mut message = vec![0x08, 0x01];
    for _ in 0..300 {
        let mut outer = vec![0x0a];
        encode_varint(message.len() as u64, &mut outer);
        outer.extend(&message);
        message = outer;
    }
    assert_eq!(written(&shown(&message)), message);
    assert_eq!(shown(&message).matches('{').count(), DEEPEST);
    let groups = [vec![0x0b; 1000], vec![0x0c; 1000]].concat();
    assert!(shown(&groups).starts_with("not protobuf: "));
    let groups = [vec![0x0b; DEEPEST / 2], vec![0x0c; DEEPEST / 2]].concat();
    assert_eq!(written(&shown(&groups)), groups);
}

/// The bytes of some message, of fields of every kind.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![1u64..20, 1u64..=LARGEST_FIELD];
    let leaf =
        (number.clone(), 0u64..6, any::<u64>(), prop_oneof![".{0,20}".prop_map(String::into_bytes), any::<Vec<u8>>()])
            .prop_map(|(number, kind, value, content)| {
                let mut out = Vec::new();
                let tag = |kind: u64, out: &mut Vec<u8>| encode_varint(number << 3 | kind, out);
                match kind {
                    0 => (tag(0, &mut out), encode_varint(value, &mut out)).0,
                    1 => (tag(1, &mut out), out.extend(value.to_le_bytes())).0,
                    2 => (tag(1, &mut out), out.extend(((value >> 40) as f64 / 8.0).to_le_bytes())).0,
                    3 => (tag(5, &mut out), out.extend((value as u32).to_le_bytes())).0,
                    4 => (tag(5, &mut out), out.extend(((value >> 50) as f32 / 8.0).to_le_bytes())).0,
                    _ => {
                        tag(2, &mut out);
                        encode_varint(content.len() as u64, &mut out);
                        out.extend(content);
                    }
                }
                out
            });
    leaf.prop_recursive(6, 60, 5, move |inner| {
        (number.clone(), any::<bool>(), prop::collection::vec(inner, 0..5)).prop_map(|(number, is_group, fields)| {
            let content = fields.concat();
            let mut out = Vec::new();
            encode_varint(number << 3 | if is_group { 3 } else { 2 }, &mut out);
            if !is_group {
                encode_varint(content.len() as u64, &mut out);
            }
            out.extend(content);
            if is_group {
                encode_varint(number << 3 | 4, &mut out);
            }
            out
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_is_shown_in_one_line_from_which_it_can_be_made_again(message in message()) {
        let line = shown(&message);
        prop_assert!(!line.starts_with("not protobuf") && !line.contains('\n'), "{}", line);
        prop_assert_eq!(written(&line), message, "{}", line);
    }

    #[test]
    fn whatever_bytes_come_something_is_shown_in_one_line(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..48], 0..200),
    ) {
        let line = shown(&bytes);
        prop_assert!(!line.contains('\n'));
        if !line.starts_with("not protobuf: ") {
            prop_assert_eq!(written(&line), bytes, "{}", line);
        }
    }
}
