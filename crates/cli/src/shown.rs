//! Bytes that came from elsewhere, as a terminal may show them: nobody else moves its cursor, or sets its title.

use std::fmt::Write as _;

/// These bytes with control characters escaped, but for the ends of lines and tabs, and with what is no UTF-8 in hexadecimal
/// digits.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\n' | '\t' => shown.push(char),
                _ => put_char(char, &mut shown),
            }
        }
        for byte in chunk.invalid() {
            write!(shown, "\\x{byte:02x}").expect("a String takes everything");
        }
    }
    shown
}

/// Appends a character, escaped if it is a control character.
pub(crate) fn put_char(char: char, shown: &mut String) {
    if char.is_control() {
        shown.extend(char.escape_default());
    } else {
        shown.push(char);
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn text_is_shown_as_it_is_and_what_is_none_by_its_number() {
        assert_eq!(shown("a\tb\nü 🦀\n".as_bytes()), "a\tb\nü 🦀\n");
        assert_eq!(shown(b"\x1b]0;owned\x07\r\x7f\0"), r"\u{1b}]0;owned\u{7}\r\u{7f}\u{0}");
        // What begins a sequence without an escape character, as UTF-8 and as a byte.
        assert_eq!(shown(b"\xc2\x9b2J\x9b2J\xff"), r"\u{9b}2J\x9b2J\xff");
    }
}
