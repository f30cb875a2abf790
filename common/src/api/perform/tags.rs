//! Tags of file systems. They are where the file system is: at the other side's
//! there is nobody to keep them.

use std::collections::BTreeMap;

use super::{Answer, parse};
use crate::api::efs::{self, Key, Paging, page};
use crate::api::known::Known;
use crate::api::route::Query;
use crate::api::{Api, ApiError};

impl Api {
    pub(super) fn tag_resource(&self, id: &str, body: &[u8]) -> Result<Answer, ApiError> {
        let known = self.tagged(id)?;
        let body: efs::TagsBody = parse(body)?;
        self.change_tags(&known, |there| efs::tags(there, body.tags))
    }

    pub(super) fn untag_resource(&self, id: &str, query: &Query) -> Result<Answer, ApiError> {
        let known = self.tagged(id)?;
        let keys: Vec<&str> = query.all("tagKeys").collect();
        if keys.is_empty() {
            return Err(ApiError::bad_request("tagKeys names no tag"));
        }
        if keys.contains(&efs::PATH_TAG) {
            let message = format!("{} is where the file system is, and stays", efs::PATH_TAG);
            return Err(ApiError::bad_request(message));
        }
        self.change_tags(&known, |mut there| {
            there.retain(|key, _| !keys.contains(&key.as_str()));
            Ok(there)
        })
    }

    pub(super) fn list_tags(&self, id: &str, query: &Query) -> Result<Answer, ApiError> {
        let known = self.tagged(id)?;
        let paging = Paging::read(query, "MaxResults", "NextToken")?;
        let key = |tag: &efs::Tag| TagOrder::of(&tag.key);
        let (tags, next_token) = page(known.tags(), key, &paging);
        Answer::json(&efs::TagList { tags, next_token })
    }

    fn tagged(&self, id: &str) -> Result<Known, ApiError> {
        // EFS has tags on these too.
        if id.starts_with("fsap-") {
            let message = format!("there are no access points here, nor {id:?}");
            return Err(ApiError::new(404, "AccessPointNotFound", message));
        }
        self.known_as(id)
    }

    fn change_tags(
        &self,
        known: &Known,
        change: impl FnOnce(BTreeMap<String, String>) -> Result<BTreeMap<String, String>, ApiError>,
    ) -> Result<Answer, ApiError> {
        if known.record.is_none() {
            return Err(ApiError::bad_request(format!(
                "file system {} is at the other side: its daemon keeps its tags",
                known.id
            )));
        }
        let mut refused = None;
        self.registry.update(&known.id, |one| match change(one.tags.clone()) {
            Ok(tags) => one.tags = tags,
            Err(error) => refused = Some(error),
        })?;
        // EFS answers with an empty body.
        refused.map_or(Ok(Answer { status: 200, body: Some(serde_json::json!({})) }), Err)
    }
}

/// Bytes of a tag's key that its place in the list begins with. With the rest a token is
/// 86 characters long; EFS's are 128 at most, and a key may be longer.
const BEGINNING: usize = 48;

/// Where a tag is in the list: in the order of keys, but for those that begin alike for
/// longer than anybody reads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct TagOrder {
    beginning: String,
    hash: u64,
}

impl TagOrder {
    fn of(key: &str) -> Self {
        let beginning = key[..key.floor_char_boundary(BEGINNING)].to_owned();
        let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = *blake3::hash(key.as_bytes()).as_bytes();
        Self { beginning, hash: u64::from_be_bytes([b0, b1, b2, b3, b4, b5, b6, b7]) }
    }
}

impl Key for TagOrder {
    fn write(&self) -> String {
        format!("{:016x}{}", self.hash, self.beginning)
    }

    fn read(text: &str) -> Option<Self> {
        let (hash, beginning) = text.split_at_checked(16)?;
        let hash = u64::from_str_radix(hash, 16).ok()?;
        Some(Self { beginning: beginning.to_owned(), hash })
    }
}
