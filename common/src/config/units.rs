//! Durations and sizes as an operator writes them, with their bounds in the
//! type.

use std::fmt;
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration of `MIN` to `MAX` milliseconds, written as a whole number and a
/// unit: `"500ms"`, `"1s"`, `"5m"`, `"2h"`, `"7d"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Interval<MIN, MAX> {
    /// So many milliseconds, brought within the bounds.
    pub const fn from_millis(millis: u64) -> Self {
        if millis < MIN {
            Self(MIN)
        } else if millis > MAX {
            Self(MAX)
        } else {
            Self(millis)
        }
    }

    /// The duration.
    pub const fn get(self) -> Duration {
        Duration::from_millis(self.0)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let millis = read(text, &TIME_UNITS).ok_or_else(|| {
            format!(
                "{text:?} is not a duration (expected a whole number and ms, s, m, h or d, as in \"500ms\")"
            )
        })?;
        within(text, millis, MIN, MAX, &TIME_UNITS).map(Self)
    }
}

const TIME_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

impl<const MIN: u64, const MAX: u64> fmt::Display for Interval<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&spell(self.0, &TIME_UNITS))
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Interval<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Interval<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A duration, or `"never"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Maybe<T>(pub Option<T>);

impl<T: Serialize> Serialize for Maybe<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Some(value) => value.serialize(serializer),
            None => serializer.serialize_str(NEVER),
        }
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Maybe<Interval<MIN, MAX>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == NEVER {
            return Ok(Self(None));
        }
        Interval::parse(&text)
            .map(|value| Self(Some(value)))
            .map_err(|error| D::Error::custom(format!("{error}, or \"never\"")))
    }
}

const NEVER: &str = "never";

/// A size of `MIN` to `MAX` bytes, written as a whole number and a unit:
/// `"4096B"`, `"512KiB"`, `"64MiB"`, `"2GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Size<MIN, MAX> {
    /// So many bytes, brought within the bounds.
    pub const fn from_bytes(bytes: u64) -> Self {
        if bytes < MIN {
            Self(MIN)
        } else if bytes > MAX {
            Self(MAX)
        } else {
            Self(bytes)
        }
    }

    /// The bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

const SIZE_UNITS: [(&str, u64); 4] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

impl<const MIN: u64, const MAX: u64> fmt::Display for Size<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&spell(self.0, &SIZE_UNITS))
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Size<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Size<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = read(&text, &SIZE_UNITS).ok_or_else(|| {
            D::Error::custom(format!(
                "{text:?} is not a size (expected a whole number and B, KiB, MiB or GiB, as in \"64MiB\")"
            ))
        })?;
        within(&text, bytes, MIN, MAX, &SIZE_UNITS).map(Self).map_err(D::Error::custom)
    }
}

fn read(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start_matches(' ');
    let factor = units.iter().find(|(name, _)| *name == unit)?.1;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// In the largest unit that needs no fraction.
fn spell(value: u64, units: &[(&str, u64)]) -> String {
    let fits =
        units.iter().rev().find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor));
    match fits.or(units.first()) {
        Some((name, factor)) => format!("{}{name}", value / factor),
        None => value.to_string(),
    }
}

fn within(
    text: &str,
    value: u64,
    min: u64,
    max: u64,
    units: &[(&str, u64)],
) -> Result<u64, String> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(format!(
        "{text:?} is out of bounds (expected {} to {})",
        spell(min, units),
        spell(max, units)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Beat = Interval<100, 60_000>;

    fn beat(text: &str) -> Result<Beat, String> {
        serde_json::from_value(text.into()).map_err(|error| error.to_string())
    }

    #[test]
    fn durations_are_read_and_spelt_alike() {
        for (text, millis) in [("100ms", 100), ("1s", 1000), ("1500ms", 1500), ("1m", 60_000)] {
            assert_eq!(beat(text).unwrap().get(), Duration::from_millis(millis));
            assert_eq!(beat(text).unwrap().to_string(), text);
        }
        assert_eq!(beat("2 s").unwrap().to_string(), "2s");
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for bad in ["", "1", "s", "-1s", "1.5s", "1 w", "1sec", "99999999999999999999s", "1 0s"] {
            assert!(beat(bad).unwrap_err().contains("is not a duration"), "{bad}");
        }
        assert_eq!(beat("0s").unwrap_err(), "\"0s\" is out of bounds (expected 100ms to 1m)");
        assert!(beat("213503982334601d").unwrap_err().contains("is not a duration"));
    }

    #[test]
    fn never_is_a_word() {
        let read = |text: &str| {
            serde_json::from_value::<Maybe<Beat>>(text.into()).map_err(|error| error.to_string())
        };
        assert_eq!(read("never"), Ok(Maybe(None)));
        assert_eq!(serde_json::to_value(Maybe::<Beat>(None)).unwrap(), "never");
        assert_eq!(read("2s").unwrap().0.unwrap().get(), Duration::from_secs(2));
        assert_eq!(serde_json::to_value(read("2s").unwrap()).unwrap(), "2s");
        assert!(read("0s").unwrap_err().contains("out of bounds"));
        assert!(read("off").unwrap_err().ends_with("or \"never\""));
    }

    #[test]
    fn sizes() {
        type Batch = Size<1024, { 1 << 30 }>;
        let read = |text: &str| serde_json::from_value::<Batch>(text.into());
        assert_eq!(read("64MiB").unwrap().get(), 64 << 20);
        assert_eq!(read("64MiB").unwrap().to_string(), "64MiB");
        assert!(read("64MB").is_err() && read("64").is_err() && read("1B").is_err());
    }
}
