//! Moments on a clock, to the nanosecond.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A moment of the wall clock: nanoseconds since 1970-01-01T00:00:00Z, as told
/// by `CLOCK_REALTIME` of the side that made it. Reaches from 1677 to 2262.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Before everything: what a watermark says when nothing was promised.
    pub const NEVER: Self = Self(i64::MIN);

    /// The clock's present reading. Pure code takes a `Timestamp` as an
    /// argument instead of calling this.
    pub fn now() -> Self {
        let nanos = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => i128::try_from(after.as_nanos()).unwrap_or(i128::MAX),
            Err(before) => -i128::try_from(before.duration().as_nanos()).unwrap_or(i128::MAX),
        };
        Self(nanos.clamp(i128::from(i64::MIN) + 1, i128::from(i64::MAX)) as i64)
    }

    /// Seconds since the epoch with a fraction, as EFS's JSON has it.
    pub fn as_seconds(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// How long after `earlier` this is; zero when it is before.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// This moment moved by signed nanoseconds, held within the range.
    #[must_use]
    pub fn offset(self, nanos: i64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// RFC 3339 in UTC with milliseconds, as in `2026-11-21T08:15:30.250Z`.
    pub fn to_rfc3339(self) -> String {
        self.format(time::macros::format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
        ))
    }

    /// Without punctuation, for names of files: `20261121T081530Z`.
    pub fn to_compact(self) -> String {
        self.format(time::macros::format_description!("[year][month][day]T[hour][minute][second]Z"))
    }

    fn format(self, format: &[time::format_description::BorrowedFormatItem<'_>]) -> String {
        time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0))
            .ok()
            .and_then(|moment| moment.format(format).ok())
            .unwrap_or_else(|| format!("{}ns", self.0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_rfc3339())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let t = Timestamp(1_795_248_930_250_000_000);
        assert_eq!(t.to_rfc3339(), "2026-11-21T08:15:30.250Z");
        assert_eq!(t.to_compact(), "20261121T081530Z");
        assert!(!Timestamp::NEVER.to_rfc3339().is_empty());
    }

    #[test]
    fn since_never_goes_negative() {
        assert_eq!(Timestamp(1).since(Timestamp(5)), Duration::ZERO);
        assert_eq!(Timestamp(5).since(Timestamp(1)), Duration::from_nanos(4));
    }
}
