//! Tags of file systems. They are where the file system is: at the other side's
//! there is nobody to keep them.

use std::collections::BTreeMap;

use super::{Answer, parse};
use crate::api::efs::{self, Paging, page};
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
        let key = |tag: &efs::Tag| tag.key.clone();
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
