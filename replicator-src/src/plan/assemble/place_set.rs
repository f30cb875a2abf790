//! The entries that an object gains or loses.

use std::collections::BTreeSet;

use super::Place;

/// A set of entries, in order. Most objects have one, which is kept in place: a set
/// takes half a kilobyte for it.
#[derive(Clone, Debug, Default)]
pub(super) enum PlaceSet {
    /// None.
    #[default]
    None,
    /// One.
    One(Place),
    /// Several, or several once.
    Many(BTreeSet<Place>),
}

impl PlaceSet {
    pub(super) fn insert(&mut self, place: Place) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(place),
            Self::One(one) if one == place => Self::One(one),
            Self::One(one) => Self::Many(BTreeSet::from([one, place])),
            Self::Many(mut many) => {
                many.insert(place);
                Self::Many(many)
            }
        };
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, place: &Place) -> bool {
        match self {
            Self::One(one) if one == place => {
                *self = Self::None;
                true
            }
            Self::None | Self::One(_) => false,
            Self::Many(many) => many.remove(place),
        }
    }

    pub(super) fn contains(&self, place: &Place) -> bool {
        match self {
            Self::None => false,
            Self::One(one) => one == place,
            Self::Many(many) => many.contains(place),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first().is_none()
    }

    /// The least.
    pub(super) fn first(&self) -> Option<&Place> {
        self.iter().next()
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Place> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(one) => (Some(one), None),
            Self::Many(many) => (None, Some(many)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use replicator_common::id::ObjectId;
    use replicator_common::name::Name;

    use super::*;

    fn place(number: u8) -> Place {
        (ObjectId::new(1, &[number]).unwrap(), Name::new(b"a").unwrap())
    }

    proptest! {
        /// Held to the set that it stands for.
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0u8..4), 0..24)) {
            let (mut places, mut set) = (PlaceSet::default(), BTreeSet::new());
            for (insert, number) in steps {
                let place = place(number);
                if insert {
                    places.insert(place.clone());
                    set.insert(place);
                } else {
                    prop_assert_eq!(places.remove(&place), set.remove(&place));
                }
                prop_assert!(places.iter().eq(&set));
                prop_assert!(places.iter().rev().eq(set.iter().rev()));
                prop_assert_eq!(places.len(), set.len());
                prop_assert_eq!(places.first(), set.first());
                prop_assert_eq!(places.is_empty(), set.is_empty());
                for number in 0..4 {
                    let place = self::place(number);
                    prop_assert_eq!(places.contains(&place), set.contains(&place));
                }
            }
        }
    }
}
