//! A protobuf message without its schema: its fields by number, as they stand on the wire, in one line.
//!
//! The notation is that of protoscope, so that a line can be made into the message again:
//!
//! ```text
//! 1: 150                    a varint; negative where it has all 64 bits
//! 2: {"text"}               bytes that are text
//! 3: {`00ff`}               bytes that are neither text nor a message
//! 4: {1: 7 2: {"inner"}}    bytes that are a message, as far as one can tell
//! 5: 1.5  6: 42i64          eight bytes: a number with a point, or a whole one
//! 7: 1.5i32  8: 42i32       four bytes
//! 9: !{1: 7}                a group
//! ```
//!
//! Nothing in here fails: what is no message is shown as bytes, with a word that says so. Work is bounded by the length
//! of the message times [`DEEPEST`].

use std::fmt::Write as _;
use std::str;

/// What lies deeper is shown as bytes. Protobuf's own parsers go no further.
const DEEPEST: usize = 100;

/// The largest field number.
const LARGEST_FIELD: u64 = (1 << 29) - 1;

/// Numbers with a point are believed within these bounds; what is outside of them is more likely a whole number.
const FLOATS: std::ops::RangeInclusive<f64> = 1e-4..=1e9;

/// A fixed 64-bit number beyond this is more likely an identity or a hash, and told in hexadecimal digits. Nanoseconds since
/// 1970 are below.
const COUNTABLE: u64 = 1 << 61;

/// Appends the fields of a message, without a newline.
pub(crate) fn put(message: &[u8], out: &mut Vec<u8>) {
    let mut text = String::new();
    if is_message(message, 0) {
        put_fields(message, 0, &mut text);
    } else {
        text.push_str("not protobuf: ");
        put_bytes(message, &mut text);
    }
    out.extend_from_slice(text.as_bytes());
}

/// Whether these bytes are a message, as far as the wire tells.
pub(crate) fn may_be_message(bytes: &[u8]) -> bool {
    is_message(bytes, 0)
}

/// One field: its number, and what it holds.
struct Field<'a> {
    number: u64,
    /// Bytes by which its tag is longer than it need be.
    long_tag: usize,
    value: Value<'a>,
}

enum Value<'a> {
    Varint(Varint),
    Fixed64([u8; 8]),
    Bytes { content: &'a [u8], long_length: usize },
    Group(&'a [u8]),
    Fixed32([u8; 4]),
}

#[derive(Clone, Copy)]
struct Varint {
    value: u64,
    /// Bytes by which it is longer than it need be.
    long: usize,
}

/// Takes a varint off the front.
fn take_varint(bytes: &mut &[u8]) -> Option<Varint> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().enumerate().take(10) {
        if index == 9 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            *bytes = &bytes[index + 1..];
            let shortest = ((u64::BITS - (value | 1).leading_zeros()) as usize).div_ceil(7);
            return Some(Varint { value, long: index + 1 - shortest });
        }
    }
    None
}

/// Takes a tag off the front: field number, kind, and by how much it is too long.
fn take_tag(bytes: &mut &[u8]) -> Option<(u64, u64, usize)> {
    let Varint { value, long } = take_varint(bytes)?;
    let number = value >> 3;
    (1..=LARGEST_FIELD).contains(&number).then_some((number, value & 7, long))
}

/// Takes a field off the front; `None` if there is none, or only a part of one.
fn take_field<'a>(bytes: &mut &'a [u8], depth: usize) -> Option<Field<'a>> {
    let (number, kind, long_tag) = take_tag(bytes)?;
    let value = match kind {
        0 => Value::Varint(take_varint(bytes)?),
        1 => Value::Fixed64(take(bytes, 8)?.try_into().ok()?),
        2 => {
            let Varint { value, long } = take_varint(bytes)?;
            Value::Bytes { content: take(bytes, usize::try_from(value).ok()?)?, long_length: long }
        }
        3 => Value::Group(take_group(bytes, number, depth)?),
        5 => Value::Fixed32(take(bytes, 4)?.try_into().ok()?),
        _ => return None,
    };
    Some(Field { number, long_tag, value })
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

/// Takes the fields of a group, and its end.
fn take_group<'a>(bytes: &mut &'a [u8], number: u64, depth: usize) -> Option<&'a [u8]> {
    let all = *bytes;
    // Groups in this one that have begun.
    let mut open = vec![number];
    while let Some(&innermost) = open.last() {
        let before = bytes.len();
        let mut ahead = *bytes;
        match take_tag(&mut ahead)? {
            (number, 3, _) if depth + open.len() < DEEPEST => {
                open.push(number);
                *bytes = ahead;
            }
            (_, 3, _) => return None,
            (number, 4, long) => {
                // A longer form of an end could not be told apart in what is shown.
                if number != innermost || long > 0 {
                    return None;
                }
                open.pop();
                *bytes = ahead;
                if open.is_empty() {
                    return Some(&all[..all.len() - before]);
                }
            }
            _ => {
                take_field(bytes, depth)?;
            }
        }
    }
    None
}

/// Whether the bytes are fields and nothing else. What is inside of those that hold bytes is not asked.
fn is_message(mut bytes: &[u8], depth: usize) -> bool {
    while !bytes.is_empty() {
        if take_field(&mut bytes, depth).is_none() {
            return false;
        }
    }
    true
}

fn put_fields(mut message: &[u8], depth: usize, out: &mut String) {
    let mut separator = "";
    while let Some(field) = take_field(&mut message, depth) {
        out.push_str(separator);
        separator = " ";
        put_long(field.long_tag, out);
        push(out, format_args!("{}: ", field.number));
        match field.value {
            Value::Varint(Varint { value, long }) => {
                put_long(long, out);
                push(out, format_args!("{}", value as i64));
            }
            Value::Fixed64(bytes) => put_fixed64(bytes, out),
            Value::Fixed32(bytes) => put_fixed32(bytes, out),
            Value::Bytes { content, long_length } => {
                put_long(long_length, out);
                out.push('{');
                if is_inner_message(content, depth + 1) {
                    put_fields(content, depth + 1, out);
                } else if !content.is_empty() {
                    put_bytes(content, out);
                }
                out.push('}');
            }
            Value::Group(content) => {
                out.push_str("!{");
                put_fields(content, depth + 1, out);
                out.push('}');
            }
        }
    }
}

fn push(out: &mut String, what: std::fmt::Arguments<'_>) {
    out.write_fmt(what).expect("a String takes everything");
}

fn put_long(bytes: usize, out: &mut String) {
    if bytes > 0 {
        push(out, format_args!("long-form:{bytes} "));
    }
}

fn put_fixed64(bytes: [u8; 8], out: &mut String) {
    let (float, number) = (f64::from_le_bytes(bytes), u64::from_le_bytes(bytes));
    if FLOATS.contains(&float.abs()) {
        push(out, format_args!("{float:?}"));
    } else if (number as i64).unsigned_abs() < COUNTABLE {
        push(out, format_args!("{}i64", number as i64));
    } else {
        push(out, format_args!("{number:#x}i64"));
    }
}

fn put_fixed32(bytes: [u8; 4], out: &mut String) {
    let float = f32::from_le_bytes(bytes);
    if FLOATS.contains(&f64::from(float.abs())) {
        push(out, format_args!("{float:?}i32"));
    } else {
        push(out, format_args!("{}i32", i32::from_le_bytes(bytes)));
    }
}

/// Whether the bytes of a field are rather a message than text, or neither.
///
/// Every message could be text or plain bytes; the wire does not say. Text that happens to be fields is rare, and rarer
/// still where one of them holds bytes of some length that end where the field does.
fn is_inner_message(content: &[u8], depth: usize) -> bool {
    if content.is_empty() || depth >= DEEPEST || !is_message(content, depth) {
        return false;
    }
    !is_text(content) || has_long_bytes(content, depth)
}

fn has_long_bytes(mut message: &[u8], depth: usize) -> bool {
    let half = message.len() / 2;
    while let Some(field) = take_field(&mut message, depth) {
        if let Value::Bytes { content, .. } = field.value
            && content.len() >= half.max(8)
        {
            return true;
        }
    }
    false
}

/// Text as people write it.
fn is_text(bytes: &[u8]) -> bool {
    let is_plain = |char: char| !char.is_control() || matches!(char, '\n' | '\r' | '\t');
    str::from_utf8(bytes).is_ok_and(|text| text.chars().all(is_plain))
}

fn put_bytes(bytes: &[u8], out: &mut String) {
    match str::from_utf8(bytes) {
        Ok(text) if is_text(bytes) => {
            out.push('"');
            for char in text.chars() {
                match char {
                    '"' | '\\' => out.extend(['\\', char]),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    char => out.push(char),
                }
            }
            out.push('"');
        }
        _ => {
            out.push('`');
            out.push_str(&const_hex::encode(bytes));
            out.push('`');
        }
    }
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
