//! Lists that are told page by page. A token names the last thing of the page
//! before; it stays valid when things come and go between pages.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::api::ApiError;
use crate::api::route::Query;
use crate::id::FileSystemId;
use crate::time::Timestamp;

/// The most things of one answer, and the number when the query names none.
const PAGE_MAX: usize = 100;

/// What a list is in the order of.
pub(in crate::api) trait Key: Ord + Sized {
    /// For a token, which is opaque to clients.
    fn write(&self) -> String;
    /// What [`Self::write`] wrote.
    fn read(text: &str) -> Option<Self>;
}

/// The order of what is listed by creation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::api) struct Created {
    time: Timestamp,
    id: FileSystemId,
}

impl Created {
    pub(in crate::api) fn new(time: Timestamp, id: &FileSystemId) -> Self {
        Self { time, id: id.clone() }
    }
}

impl Key for Created {
    fn write(&self) -> String {
        format!("{}/{}", self.time.0, self.id)
    }

    fn read(text: &str) -> Option<Self> {
        let (time, id) = text.split_once('/')?;
        Some(Self { time: Timestamp(time.parse().ok()?), id: id.parse().ok()? })
    }
}

/// What a query says of the page it wants.
#[derive(Debug)]
pub(in crate::api) struct Paging<K> {
    size: usize,
    after: Option<K>,
}

impl<K: Key> Paging<K> {
    /// Reads the two parameters of these names.
    ///
    /// # Errors
    /// `BadRequest` when one of them makes no sense.
    pub(in crate::api) fn read(query: &Query, size: &str, token: &str) -> Result<Self, ApiError> {
        let invalid =
            |text: &str| ApiError::bad_request(format!("{size} must be 1 or more, not {text:?}"));
        let size = match query.get(size) {
            None => PAGE_MAX,
            Some(text) => match text.parse::<u64>() {
                Ok(number) if number >= 1 => number.min(PAGE_MAX as u64) as usize,
                _ => return Err(invalid(text)),
            },
        };
        let foreign = || {
            ApiError::bad_request(format!("{token} is not one that an earlier answer contained"))
        };
        let read = |text: &str| {
            let bytes = URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| !bytes.is_empty())?;
            K::read(&String::from_utf8(bytes).ok()?)
        };
        let after = query.get(token).map(|text| read(text).ok_or_else(foreign)).transpose()?;
        Ok(Self { size, after })
    }
}

/// One page, and the token of the next one; none on the last.
pub(in crate::api) fn page<T, K: Key>(
    mut all: Vec<T>,
    key: impl Fn(&T) -> K,
    paging: &Paging<K>,
) -> (Vec<T>, Option<String>) {
    all.sort_by_key(&key);
    all.retain(|one| paging.after.as_ref().is_none_or(|after| key(one) > *after));
    let more = all.len() > paging.size;
    all.truncate(paging.size);
    let last = all.last().filter(|_| more);
    let token = last.map(|one| URL_SAFE_NO_PAD.encode(key(one).write()));
    (all, token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::route::route;

    impl Key for String {
        fn write(&self) -> String {
            self.clone()
        }

        fn read(text: &str) -> Option<Self> {
            Some(text.to_owned())
        }
    }

    fn paging<K: Key>(query: &str) -> Result<Paging<K>, ApiError> {
        let call = route("GET", &format!("/2015-02-01/file-systems?{query}")).unwrap();
        Paging::read(&call.query, "MaxItems", "Marker")
    }

    proptest::proptest! {
        /// Whatever the size of pages, they hold everything once and in order,
        /// also when what they end with goes away in between.
        #[test]
        fn pages_are_the_whole(
            names in proptest::collection::btree_set("[a-zé]{1,5}", 0..40),
            size in 1usize..8,
            forget in proptest::bool::ANY,
        ) {
            let mut left: Vec<String> = names.iter().rev().cloned().collect();
            let (mut seen, mut marker) = (Vec::new(), None);
            loop {
                let after = marker.map(|marker| format!("&Marker={marker}")).unwrap_or_default();
                let paging = paging::<String>(&format!("MaxItems={size}{after}")).unwrap();
                let (chosen, next) = page(left.clone(), String::clone, &paging);
                seen.extend(chosen.iter().cloned());
                if forget {
                    left.retain(|name| Some(name) != chosen.last());
                }
                marker = next;
                if marker.is_none() {
                    break;
                }
            }
            proptest::prop_assert_eq!(seen, names.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "MaxItems=0",
            "MaxItems=-1",
            "MaxItems=x",
            "MaxItems=",
            "Marker=",
            "Marker=x",
            "Marker=eA",
        ] {
            assert_eq!(paging::<Created>(bad).unwrap_err().class, "BadRequest", "{bad}");
        }
        assert_eq!(paging::<Created>("MaxItems=18446744073709551615").unwrap().size, PAGE_MAX);
        let last = Created::new(Timestamp(-5), &"fs-01234567".parse().unwrap());
        let token = URL_SAFE_NO_PAD.encode(last.write());
        assert_eq!(paging::<Created>(&format!("Marker={token}")).unwrap().after, Some(last));
        // EFS's bound of a token.
        assert!(token.len() <= 128);
    }
}
