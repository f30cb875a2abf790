//! Figures as people read them.

use std::time::Duration;

/// `0 B`, `512 B`, `1.5 KiB`, `12.0 GiB`.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if value < 1024 {
        return format!("{value} B");
    }
    let mut scaled = value as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.0.
    while scaled >= 1023.95 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

/// With thousands apart: `1,234,567`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `one file`, `7 files`.
pub fn several(value: u64, one: &str, many: &str) -> String {
    if value == 1 { format!("1 {one}") } else { format!("{} {many}", count(value)) }
}

/// A length of time: `0 s`, `350 ms`, `2.5 s`, `45 s`, `3 min 5 s`, `2 h 3 min`,
/// `5 d 2 h`.
pub fn time(value: Duration) -> String {
    let seconds = value.as_secs();
    match seconds {
        0 if value.as_millis() == 0 => "0 s".to_owned(),
        0 => format!("{} ms", value.as_millis()),
        1..10 => format!("{seconds}.{} s", value.subsec_millis() / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// [`time`] of seconds, whatever their value.
pub fn seconds(value: f64) -> String {
    Duration::try_from_secs_f64(value.max(0.0)).map_or_else(|_| "?".to_owned(), time)
}

/// Per second: whole numbers.
pub fn rate(per_second: f64) -> u64 {
    // `as` saturates and takes NaN for 0.
    per_second.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        assert_eq!([count(0), count(999), count(1000)], ["0", "999", "1,000"]);
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(several(1, "file", "files"), "1 file");
        for (millis, text) in [
            (0, "0 s"),
            (350, "350 ms"),
            (2590, "2.5 s"),
            (59_999, "59 s"),
            (185_000, "3 min 5 s"),
            (7_380_000, "2 h 3 min"),
            (439_200_000, "5 d 2 h"),
        ] {
            assert_eq!(time(Duration::from_millis(millis)), text);
        }
        assert_eq!([seconds(-1.0), seconds(f64::NAN), seconds(f64::INFINITY)], ["0 s", "0 s", "?"]);
        assert_eq!(rate(f64::NAN), 0);
    }
}
