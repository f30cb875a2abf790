//! What a batch asks the readers for.

use foldhash::HashMap;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;

/// An object that must be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What it is.
    pub kind: Kind,
    /// The replica does not have it.
    pub new: bool,
    /// Content may differ; else only attributes.
    pub content: bool,
    /// A name under which it was seen.
    pub hint: Option<(ObjectId, Name)>,
}

/// Every object that was ever needed in a batch; those among them that the readers
/// were not given yet are open.
#[derive(Default)]
pub struct Asked {
    all: HashMap<ObjectId, One>,
    /// The open ones, each once.
    open: Vec<ObjectId>,
    bytes: u64,
}

struct One {
    need: Need,
    open: bool,
    /// Counted into the bytes.
    bytes: u64,
}

impl Asked {
    /// What is needed of an object, by all that was said of it (see [`Self::need`]).
    pub fn get(&self, object: &ObjectId) -> Option<&Need> {
        self.all.get(object).map(|one| &one.need)
    }

    /// Whether nothing was ever needed.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether an object is to be read, and nobody was given it yet.
    pub fn is_open(&self, object: &ObjectId) -> bool {
        self.all.get(object).is_some_and(|one| one.open)
    }

    /// How many objects are open.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Content bytes of all objects, as far as they were told.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the object's content was needed in this batch.
    pub fn wants_content(&self, object: &ObjectId) -> bool {
        self.get(object).is_some_and(|need| need.content)
    }

    /// Adds a need, or widens one; with the bytes of its content, where these count.
    ///
    /// INVARIANT: an object whose content was asked for once in a batch is read
    /// with content each further time; for only the last reading counts, and
    /// one of attributes alone would lose what the one before found.
    pub fn need(&mut self, object: ObjectId, mut need: Need, bytes: Option<u64>) {
        let Some(one) = self.all.get_mut(&object) else {
            let bytes = bytes.unwrap_or(0);
            self.bytes += bytes;
            self.open.push(object.clone());
            self.all.insert(object, One { need, open: true, bytes });
            return;
        };
        need.content |= one.need.content;
        if one.open {
            need.hint = need.hint.or(one.need.hint.take());
        } else {
            self.open.push(object);
        }
        one.need = need;
        one.open = true;
        if let Some(bytes) = bytes {
            self.bytes = self.bytes - one.bytes + bytes;
            one.bytes = bytes;
        }
    }

    /// What must be read now, in the order of ids: it is not open any more.
    pub fn take(&mut self) -> Vec<(ObjectId, Need)> {
        self.open.sort_unstable();
        let taken = self.open.drain(..).filter_map(|object| {
            let one = self.all.get_mut(&object)?;
            one.open = false;
            Some((object, one.need.clone()))
        });
        taken.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> ObjectId {
        ObjectId::new(1, &[number]).unwrap()
    }

    fn need(content: bool, hint: Option<&str>) -> Need {
        let hint = hint.map(|name| (id(0), Name::new(name.as_bytes()).unwrap()));
        Need { kind: Kind::File, new: false, content, hint }
    }

    #[test]
    fn what_is_needed_twice_is_read_once_and_as_widely_as_was_asked() {
        let mut asked = Asked::default();
        asked.need(id(2), need(true, Some("a")), Some(10));
        asked.need(id(1), need(false, None), None);
        asked.need(id(2), need(false, None), None);
        asked.need(id(2), need(true, None), Some(7));
        assert_eq!((asked.open_count(), asked.bytes()), (2, 7));
        assert_eq!(asked.take(), [(id(1), need(false, None)), (id(2), need(true, Some("a")))]);
        assert!(asked.take().is_empty() && asked.open_count() == 0 && !asked.is_open(&id(2)));
        assert_eq!(asked.bytes(), 7, "what was taken still counts");
    }

    #[test]
    fn what_was_read_is_read_again_with_its_content() {
        let mut asked = Asked::default();
        asked.need(id(1), need(true, Some("a")), Some(5));
        asked.take();
        asked.need(id(1), need(false, Some("b")), None);
        assert!(asked.is_open(&id(1)) && asked.wants_content(&id(1)));
        assert_eq!(asked.take(), [(id(1), need(true, Some("b")))]);
        // A name of before may not lead there any more.
        asked.need(id(1), need(false, None), None);
        assert_eq!(asked.take(), [(id(1), need(true, None))]);
    }
}
