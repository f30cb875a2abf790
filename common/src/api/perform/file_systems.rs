//! File systems: registered, told of, protected, forgotten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Answer, parse};
use crate::api::efs::{self, Created, Paging, page};
use crate::api::known::{End, Known};
use crate::api::route::Query;
use crate::api::{Api, ApiError, own};
use crate::registry::{NewFileSystem, ThroughputMode};

/// EFS's bound, in characters.
const TOKEN_MAX: usize = 64;

impl Api {
    pub(super) fn describe_file_systems(&self, query: &Query) -> Result<Answer, ApiError> {
        let paging = Paging::read(query, "MaxItems", "Marker")?;
        let (wanted, token) = (query.get("FileSystemId"), query.get("CreationToken"));
        if wanted.is_some() && token.is_some() {
            let message = "either FileSystemId or CreationToken can be given";
            return Err(ApiError::bad_request(message));
        }
        let mut all = match wanted {
            Some(id) => vec![self.known_as(id)?],
            None => self.known(),
        };
        if let Some(token) = token {
            let named =
                |one: &Known| one.record.as_ref().is_some_and(|r| r.creation_token == token);
            all.retain(named);
        }
        let created = |one: &Known| Created::new(one.created, &one.id);
        let (chosen, next_marker) = page(all, created, &paging);
        Answer::json(&efs::FileSystems {
            marker: query.get("Marker").map(str::to_owned),
            file_systems: chosen.iter().map(Known::body).collect(),
            next_marker,
        })
    }

    pub(super) fn create_file_system(&self, body: &[u8]) -> Result<Answer, ApiError> {
        let mut body: efs::CreateFileSystemBody = parse(body)?;
        let throughput_mode = body.throughput_mode()?;
        let creation_token = body.creation_token.take().unwrap_or_default();
        // The path is no tag like others: it is kept as what it is.
        let mut tags = std::mem::take(&mut body.tags);
        let place = tags.iter().position(|tag| tag.key == efs::PATH_TAG);
        let path = place.map(|at| tags.remove(at).value).ok_or_else(|| {
            ApiError::bad_request(format!(
                "Tags must have {}, the absolute path of a directory or mount on the daemon's host",
                efs::PATH_TAG
            ))
        })?;
        let made = self.register(creation_token, Path::new(&path), throughput_mode, tags)?;
        Ok(Answer { status: 201, ..Answer::json(&made.body())? })
    }

    /// The same in our own form.
    pub(super) fn register_own(&self, body: own::RegisterBody) -> Result<Answer, ApiError> {
        // Without a token, the path is what must not be there twice.
        let token = body.creation_token.unwrap_or_else(|| token_of(&body.path));
        let tags = body.tags.into_iter().map(|(key, value)| efs::Tag { key, value }).collect();
        let made = self.register(token, &body.path, ThroughputMode::default(), tags)?;
        Answer::json(&own_form(&made))
    }

    pub(super) fn list_own(&self) -> Result<Answer, ApiError> {
        let mut all = self.known();
        all.sort_by_key(|one| Created::new(one.created, &one.id));
        Answer::json(&all.iter().map(own_form).collect::<Vec<_>>())
    }

    fn register(
        &self,
        creation_token: String,
        path: &Path,
        throughput_mode: ThroughputMode,
        tags: Vec<efs::Tag>,
    ) -> Result<Known, ApiError> {
        if !(1..=TOKEN_MAX).contains(&creation_token.chars().count()) {
            return Err(ApiError::bad_request(format!(
                "CreationToken has 1 to {TOKEN_MAX} characters"
            )));
        }
        let tags = efs::tags(BTreeMap::new(), tags)?;
        // Before a directory is made for it.
        self.registry.is_new(&creation_token)?;
        let path = directory(path)?;
        let new = NewFileSystem { creation_token, path, throughput_mode, tags };
        let made = self.registry.create(new)?;
        self.known_as(made.id.as_str())
    }

    pub(super) fn delete_file_system(&self, id: &str) -> Result<Answer, ApiError> {
        let known = self.known_as(id)?;
        if known.end.is_some() {
            return Err(ApiError::new(
                409,
                "FileSystemInUse",
                format!("file system {} is in a replication configuration", known.id),
            ));
        }
        self.registry.delete(&known.id)?;
        Ok(Answer { status: 204, body: None })
    }

    pub(super) fn update_protection(&self, id: &str, body: &[u8]) -> Result<Answer, ApiError> {
        let known = self.known_as(id)?;
        let body: efs::ProtectionBody = parse(body)?;
        let protected = body.protected()?;
        match known.end {
            None => {}
            Some(End::Destination) => {
                return Err(ApiError::new(
                    409,
                    "ReplicationAlreadyExists",
                    "ReplicationOverwriteProtection cannot be changed while the file system is a replication destination",
                ));
            }
            Some(End::Source) => return Err(ApiError::already_replicated(&known.id)),
        }
        known.check_available()?;
        let changed = self.registry.update(&known.id, |one| one.protected = protected)?;
        let word = if changed.protected { "ENABLED" } else { "DISABLED" };
        Answer::json(&efs::Protection::new(word))
    }
}

/// The token of a registration that has none: the same for the same path.
fn token_of(path: &Path) -> String {
    format!("path-{}", &blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex()[..32])
}

/// The directory at a path, without links; made when it is missing (its parent
/// is not).
fn directory(path: &Path) -> Result<PathBuf, ApiError> {
    let refused = |reason: String| ApiError::bad_request(format!("{}: {reason}", path.display()));
    if !path.is_absolute() {
        return Err(refused("the path of a file system must be absolute".to_owned()));
    }
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(refused(format!("cannot be made: {error}")));
        }
        _ => {}
    }
    let found = path.canonicalize().map_err(|error| refused(error.to_string()))?;
    if !found.is_dir() {
        return Err(refused("is not a directory".to_owned()));
    }
    Ok(found)
}

fn own_form(known: &Known) -> own::FileSystem {
    own::FileSystem {
        path: known.path.clone(),
        here: known.record.is_some(),
        end: known.end.map(|end| match end {
            End::Source => "SOURCE".to_owned(),
            End::Destination => "DESTINATION".to_owned(),
        }),
        file_system: known.body(),
    }
}
