//! How sizes and durations are written.

use std::time::Duration;

pub(crate) fn parse_size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    digits
        .parse::<usize>()
        .ok()
        .zip(unit)
        .ok_or("write bytes, or a whole number of KiB, MiB or GiB: 4096, 64KiB, 1MiB")
        .and_then(|(number, unit): (usize, usize)| number.checked_mul(unit).ok_or("larger than this machine can hold"))
        .map_err(String::from)
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|_| String::from("write a number and its unit: 500ms, 30s, 2m"))
}

pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("write how long to wait, such as 1s".to_owned()),
        interval => Ok(interval),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_whole_binary_units() {
        let sizes = [("0", 0), ("4096", 4096), ("64KiB", 64 << 10), ("1MiB", 1 << 20), ("2GiB", 2 << 30)];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "KiB", "-1", "64KB", "64K", "64 KiB", "1.5MiB", "1MiB1", "99999999999999999999", "17179869184GiB"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_carry_their_unit_except_zero() {
        let durations = [("0", 0), ("0s", 0), ("500ms", 500), ("30s", 30_000), ("2m", 120_000)];
        for (text, milliseconds) in durations {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "30", "-1s", "s", "soon"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
