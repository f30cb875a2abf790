//! What a new large file was probably made from: the basis of its delta.

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;

use super::{Engine, EngineError};
use crate::index::{Content, Known, View};

/// Siblings looked at for one that resembles a new file.
const SIBLINGS: usize = 1000;

impl Engine {
    /// A file of the replica that a new one probably was made from: the one
    /// that stands under its name, or a sibling with a similar name (editors
    /// and copiers write `.name.XXXX` or `name.tmp` and rename).
    pub(super) fn resembling<'a>(
        &self,
        names: impl Iterator<Item = &'a (ObjectId, Name)> + Clone,
    ) -> Result<Option<(ObjectId, Known)>, EngineError> {
        for (directory, name) in names.clone() {
            if let Some(object) = self.index.entry(directory, name)?
                && let Some(known) = self.chunked(&object)?
            {
                return Ok(Some((object, known)));
            }
        }
        for (directory, name) in names {
            let mut best: Option<(usize, ObjectId, Known)> = None;
            for (other, object) in self.index.children(directory)?.into_iter().take(SIBLINGS) {
                let score = likeness(name.as_bytes(), other.as_bytes());
                if score > best.as_ref().map_or(0, |(score, ..)| *score)
                    && let Some(known) = self.chunked(&object)?
                {
                    best = Some((score, object, known));
                }
            }
            if let Some((_, object, known)) = best {
                return Ok(Some((object, known)));
            }
        }
        Ok(None)
    }

    fn chunked(&self, object: &ObjectId) -> Result<Option<Known>, EngineError> {
        let known = self.index.object(object)?;
        Ok(known.filter(|known| {
            known.state.kind == Kind::File && matches!(known.content, Content::Chunks { .. })
        }))
    }
}

/// How much one name looks like made from the other: the length of the shorter
/// one's core when the longer holds it, else 0.
fn likeness(a: &[u8], b: &[u8]) -> usize {
    let core = |name: &[u8]| -> Vec<u8> {
        let trim = |b: &u8| matches!(b, b'.' | b'#' | b'~' | b'_');
        let start = name.iter().position(|b| !trim(b)).unwrap_or(0);
        let end = name.iter().rposition(|b| !trim(b)).map_or(name.len(), |end| end + 1);
        name[start..end.max(start)].to_vec()
    };
    let (a, b) = (core(a), core(b));
    let (short, long) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let holds = short.len() >= 2 && long.windows(short.len()).any(|window| window == short);
    if holds { short.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::likeness;

    #[test]
    fn temporary_names_look_like_their_target() {
        for (a, b) in [
            (&b".db.sqlite.AbC123"[..], &b"db.sqlite"[..]),
            (b"image.img.tmp", b"image.img"),
            (b"report~", b"report"),
            (b"#notes#", b"notes"),
        ] {
            assert!(likeness(a, b) > 0, "{}", a.escape_ascii());
        }
        assert_eq!(likeness(b"alpha", b"beta"), 0);
        assert!(likeness(b"db.sqlite.tmp", b"db.sqlite") > likeness(b"db.sqlite.tmp", b"db"));
    }
}
