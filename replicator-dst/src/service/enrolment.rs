//! How a source becomes one of a destination's: it redeems a token, and the
//! configuration is there.

use std::sync::Arc;

use quinn::Connection;
use replicator_common::config::is_region;
use replicator_common::crashsafe;
use replicator_common::id::FileSystemId;
use replicator_common::net::enrol::{
    self, EnrolAnswer, EnrolRefusal, EnrolRequest, Enrolled, Redemption,
};
use replicator_common::net::identity::Fingerprint;
use replicator_common::status::DesiredState;
use replicator_common::time::Timestamp;

use super::{Inner, enter, start};
use crate::failover;
use crate::making;
use crate::replica::Config;
use crate::suitable;

impl Inner {
    pub(super) async fn enrol(
        self: &Arc<Self>,
        connection: &Connection,
        peer: Fingerprint,
    ) -> Result<(), enrol::EnrolError> {
        let (request, responder) = enrol::receive(connection).await?;
        let inner = self.clone();
        let redeemed = tokio::task::spawn_blocking(move || inner.redeem(&request, peer)).await;
        let answer = match redeemed {
            Ok(Ok(enrolled)) => EnrolAnswer::Accepted(enrolled),
            Ok(Err(reason)) => EnrolAnswer::Refused { reason },
            Err(_) => EnrolAnswer::Refused {
                reason: EnrolRefusal::Unable("the destination failed".to_owned()),
            },
        };
        responder.answer(&answer).await
    }

    /// Redeems a token: the configuration exists afterwards, durably.
    fn redeem(&self, request: &EnrolRequest, peer: Fingerprint) -> Result<Enrolled, EnrolRefusal> {
        let unable = |error: &dyn std::fmt::Display| EnrolRefusal::Unable(error.to_string());
        let mut grants = self.book.grants();
        let mut next = grants.clone();
        let redemption = next.tokens.redeem(&request.secret, peer, Timestamp::now())?;
        if !is_region(&request.source_region) {
            return Err(EnrolRefusal::Unable(format!(
                "{:?} is not a region",
                request.source_region
            )));
        }
        let secret = Fingerprint::of(&request.secret.0);
        let grant = next.grants.iter().find(|grant| grant.secret == secret).cloned();
        let grant = grant.ok_or(EnrolRefusal::WrongSecret)?;
        if let (Redemption::Again, Some(running)) =
            (redemption, self.running().get(&request.source))
        {
            return Ok(self.enrolled(&running.replica.config));
        }
        if redemption == Redemption::Again {
            return Err(EnrolRefusal::Used);
        }
        let known = self.running().contains_key(&request.source)
            || self.broken().contains_key(&request.source);
        if known {
            return Err(EnrolRefusal::Unable(format!(
                "{} is in a replication configuration here already",
                request.source
            )));
        }
        self.check(&grant.path, grant.reconcile).map_err(|error| unable(&error))?;
        let empty = suitable::is_empty(&grant.path).map_err(|error| unable(&error))?;
        let registered = self.registry.at(&grant.path).map(|known| known.id);
        let config = Config {
            source: request.source.clone(),
            source_region: request.source_region.clone(),
            destination: registered.unwrap_or_else(FileSystemId::random),
            path: grant.path,
            peer,
            creation_time: request.creation_time,
            desired: DesiredState::Enabled,
            reconcile: grant.reconcile && !empty,
            devices: request.devices,
        };
        let directory = self.options.state_dir.join("replicas").join(config.source.as_str());
        // Left behind by a configuration that was interrupted in its making or
        // its removal; without a config.json it means nothing.
        failover::sweep(&directory).map_err(|error| unable(&error))?;
        crashsafe::remove(&directory.join("store.redb")).map_err(|error| unable(&error))?;
        crashsafe::create_directory(&directory).map_err(|error| unable(&error))?;
        making::begin(&directory, &config).map_err(|error| unable(&error))?;
        let running = start(&directory, config.clone(), self.replicas.clone())
            .inspect_err(|_| making::take_back(&directory))
            .map_err(|error| unable(&error))?;
        // The configuration last: with it, all is there. Then the token, whose
        // second redemption by the same peer finds the configuration.
        config.write(&directory).map_err(|error| unable(&error))?;
        making::done(&directory).map_err(|error| unable(&error))?;
        next.write(&self.options.state_dir).map_err(|error| unable(&error))?;
        *grants = next;
        drop(grants);
        self.book.pin(&config);
        enter(&self.registry, &config);
        self.running().insert(config.source.clone(), running);
        tracing::info!(source = %config.source, path = %config.path.display(), "enrolled");
        Ok(self.enrolled(&config))
    }

    fn enrolled(&self, config: &Config) -> Enrolled {
        Enrolled {
            destination: config.destination.clone(),
            region: self.options.region.clone(),
            path: config.path.display().to_string(),
            reconcile: config.reconcile,
        }
    }
}
