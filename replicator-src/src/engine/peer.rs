//! What the destination says, and what a session's begin and end mean.

use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, Edition};
use replicator_common::time::Timestamp;
use replicator_common::wire::{DestinationMessage, SourceMessage};

use super::commit::earlier;
use super::kept::Kept;
use super::{Engine, EngineError, FailoverReply};
use crate::index::{Index, View};
use crate::ledger::{Memory, Owed, take_back};
use crate::meters::{ErrorKind, Stage};
use crate::replies::Breach;
use crate::session::{LinkEvent, Session};

impl Engine {
    pub(super) fn link(&mut self, event: LinkEvent) -> Result<(), EngineError> {
        match event {
            LinkEvent::Connected(session) => self.connected(session),
            LinkEvent::Lost { number, reason, refusal, next } => {
                self.shared.lost(&reason, refusal.as_ref(), next);
                self.lost(number, &reason)
            }
            LinkEvent::Clocks { number, exchange, room: _room } => {
                if self.session.as_ref().is_some_and(|session| session.number == number) {
                    self.shared.clocks(&exchange);
                }
                Ok(())
            }
            LinkEvent::Message { number, message, room: _room } => {
                let ours = |session: &&Session| session.number == number && !session.is_rejected();
                if self.session.as_ref().filter(ours).is_none() {
                    return Ok(());
                }
                self.message(*message)
            }
        }
    }

    /// A session is open: settles what the last one left undecided.
    fn connected(&mut self, session: Session) -> Result<(), EngineError> {
        let hello = session.hello.clone();
        let known = self.peer()?;
        let merged = match self.index.acknowledged() {
            Some(mark) => mark.edition(),
            None => self.index.store().mark()?.edition(),
        };
        let memory = Memory { peer: known, merged, pending: self.pending()? };
        let halfway = self.index.store().reconciling()?;
        if halfway || !memory.agrees(hello.incarnation, hello.committed) {
            return self.distrust(session, known.is_some());
        }
        if known != Some(hello.incarnation) {
            self.index.store().set_peer(hello.incarnation)?;
        }
        tracing::info!(
            peer = session.peer(),
            committed = %hello.committed.batch,
            "session open"
        );
        self.shared.connected(&session);
        self.settle(hello.committed.batch)?;
        self.unsettled = false;
        self.next_batch = hello.committed.batch.next();
        if hello.reconcile && !self.root_known()? && self.reconcile.is_none() {
            self.start_reconcile(&session)?;
        }
        self.kept = Kept::default();
        self.session = Some(session);
        Ok(())
    }

    /// The index does not describe this replica: one of the sides was set back,
    /// replaced, or is new (trap 14). The index starts anew under a new
    /// incarnation, and the session with it.
    pub(super) fn distrust(&mut self, session: Session, had_peer: bool) -> Result<(), EngineError> {
        if had_peer {
            tracing::warn!("the two sides do not remember the same history; comparing anew");
        }
        self.index.store().reset()?;
        self.index = Index::new(self.index.store().clone())?;
        self.halt.begin_anew();
        self.in_flight.clear();
        self.touched.forget();
        self.forced.clear();
        self.asked.clear();
        self.reset_transfers();
        self.holds.clear();
        self.owed = Owed::default();
        self.overtaken.clear();
        self.dirty = Default::default();
        self.astray = Default::default();
        self.reconcile = None;
        self.covered = Timestamp::NEVER;
        self.reached = Timestamp::NEVER;
        self.seen = Timestamp::NEVER;
        self.claimed = Timestamp::NEVER;
        self.totals = self.index.store().mark()?;
        self.shipped_before = -i128::from(self.wired.content());
        self.next_batch = BatchId(1);
        self.gap = None;
        self.skipped.clear();
        self.unsettled = false;
        self.open_gap(
            if had_peer { "the replica is compared anew" } else { "initial sync" }.into(),
        )?;
        let source = self.index.store().incarnation()?;
        self.shared.greeting(source, None, Edition::default(), Vec::new());
        // Dropped here: the destination must learn our new incarnation by a
        // new greeting.
        drop(session);
        Ok(())
    }

    /// Batches up to `committed` took effect; later ones are built anew.
    pub(super) fn settle(&mut self, committed: BatchId) -> Result<(), EngineError> {
        self.index.settle(committed)?;
        self.halt.lost_after(committed);
        self.touched.forget();
        let settled = self.in_flight.settle(committed);
        let mut reached = Timestamp::NEVER;
        for batch in settled.done {
            reached = reached.max(batch.reached);
            self.journal.trim(batch.mark.seq)?;
            self.shared.progressed(batch.note.progress);
            self.halt.gone(&batch.dropped);
        }
        for mut batch in settled.lost {
            let floors = self.holds.values_mut().map(|held| &mut held.floor);
            if take_back(&mut batch, &mut self.covered, &mut self.gap, floors) {
                self.shared.begin_progress();
            }
            self.reached = self.reached.min(batch.before);
            self.lost_since = earlier(self.lost_since, batch.note.oldest);
            self.dirty.merge(batch.input);
        }
        self.forget_owed()?;
        if self.gap.is_some() {
            // Batches of an earlier process may have made them.
            self.dirty.walk_orphans(self.orphans()?);
        }
        self.recall_leaving()?;
        self.totals = self.index.store().mark()?;
        self.claimed = self.totals.watermark.unwrap_or(Timestamp::NEVER);
        let mark = self.totals;
        self.shared.acknowledged(&mark, reached);
        self.greet()
    }

    /// What the next greeting says.
    pub(super) fn greet(&self) -> Result<(), EngineError> {
        let store = self.index.store();
        let acknowledged = store.mark()?.edition();
        self.shared.greeting(store.incarnation()?, store.peer()?, acknowledged, self.pending()?);
        Ok(())
    }

    /// Batches whose deltas are durable and not merged.
    fn pending(&self) -> Result<Vec<Edition>, EngineError> {
        let pending = self.index.store().pending()?;
        Ok(pending.iter().map(|delta| delta.mark.edition()).collect())
    }

    /// The destination broke the protocol. Nothing of what it said counts, and
    /// the session ends; the link tells when it has.
    pub(super) fn breach(&self, breach: &Breach) {
        tracing::warn!(%breach, "the destination broke the protocol");
        self.shared.meters().error(ErrorKind::Protocol);
        if let Some(session) = &self.session {
            session.reject(breach.to_string());
        }
    }

    fn lost(&mut self, number: u64, reason: &str) -> Result<(), EngineError> {
        tracing::debug!(number, reason, "no session");
        if self.session.as_ref().is_some_and(|session| session.number == number) {
            tracing::warn!(reason, "session lost");
            self.session = None;
            self.asked.clear();
            self.kept = Kept::default();
            self.reset_transfers();
            if self.reconcile.as_ref().is_some_and(|reconcile| !reconcile.is_complete()) {
                self.reconcile = None;
            }
            if let Some((reply, _)) = self.failing.take() {
                let _ = reply.send(Err(format!("the destination went away: {reason}")));
            }
        }
        Ok(())
    }

    fn message(&mut self, message: DestinationMessage) -> Result<(), EngineError> {
        match message {
            DestinationMessage::Durable { batch } => {
                match self.in_flight.may_acknowledge(batch, self.next_batch) {
                    Ok(()) => {
                        for flight in self.in_flight.iter() {
                            if flight.mark.batch <= batch && !flight.durable {
                                self.shared.meters().passed(Stage::Durable, flight.note.oldest);
                            }
                        }
                        self.in_flight.durable(batch);
                    }
                    Err(breach) => self.breach(&breach),
                }
            }
            DestinationMessage::Applied { batch, .. } => {
                match self.in_flight.may_acknowledge(batch, self.next_batch) {
                    Ok(()) => self.applied(batch)?,
                    Err(breach) => self.breach(&breach),
                }
            }
            DestinationMessage::Report(report) => self.shared.destination_report(*report),
            DestinationMessage::Inventory { items, last } => self.inventory(items, last),
            DestinationMessage::TransferRefused { transfer, reason } => {
                self.transfer_refused(transfer, &reason);
            }
            DestinationMessage::TransferUnplaced { transfer, reason } => {
                self.transfer_unplaced(transfer, &reason);
            }
            DestinationMessage::Returned { batch, objects, last } => {
                match self.in_flight.may_return(batch, objects.len()) {
                    Ok(()) => self.returned(batch, objects, last)?,
                    Err(breach) => self.breach(&breach),
                }
            }
            DestinationMessage::Transferred { transfer } => self.transfer_arrived(transfer),
            DestinationMessage::Described(description) => self.described(*description),
            DestinationMessage::Kept { packed, transfers, last } => {
                self.kept.tell(packed, transfers, last);
            }
            DestinationMessage::KeptChunks { object, was, chunks, last } => {
                self.kept.answer(&object, was, chunks, last);
            }
            DestinationMessage::FailedOver { report } => {
                if let Some((reply, _)) = self.failing.take() {
                    // Whoever asked may have given up waiting.
                    let _ = reply.send(Ok(*report));
                }
            }
            // The link deals with these.
            DestinationMessage::Hello(_)
            | DestinationMessage::Refused(_)
            | DestinationMessage::Clock { .. } => {}
        }
        Ok(())
    }

    /// Batches up to `batch` are in the replica.
    ///
    /// INVARIANT (acknowledged means durable): only here, and in settling, is
    /// the journal trimmed.
    fn applied(&mut self, batch: BatchId) -> Result<(), EngineError> {
        let (mut merged, mut reached) = (None, Timestamp::NEVER);
        let done = self.in_flight.applied(batch);
        if done.iter().any(|batch| !batch.dropped.is_empty()) {
            self.forget_dropped()?;
        }
        for done in done {
            self.shared.meters().acknowledged(done.note.committed_at.elapsed());
            self.shared.meters().passed(Stage::Applied, done.note.oldest);
            self.shared.progressed(done.note.progress);
            self.halt.gone(&done.dropped);
            self.kept.acknowledged();
            self.shared.count(|counters| {
                counters.batches += 1;
                counters.exact_batches += u64::from(done.note.exact);
            });
            for object in &done.dropped {
                self.opener.forget(object);
                // It may have come back meanwhile.
                if self.members.knows(object)
                    && !self.holds.contains_key(object)
                    && self.index.object(object)?.is_none()
                {
                    self.members.remove(object);
                    self.capture.directories().forget(object);
                }
            }
            self.touched.applied(done.note.subjects);
            merged = Some(done.mark);
            reached = reached.max(done.reached);
        }
        let Some(mark) = merged else { return Ok(()) };
        self.index.acknowledge(batch);
        self.journal.trim(mark.seq)?;
        self.shared.acknowledged(&mark, reached);
        self.shared.greeting_acknowledged(mark.edition());
        self.forget_refused();
        self.compared_on_this_boot()
    }

    /// Ends the doubt of another boot once nothing of its walk waits any more.
    fn compared_on_this_boot(&mut self) -> Result<(), EngineError> {
        let waits = self.gap.is_some()
            || !self.holds.is_empty()
            || !self.in_flight.is_empty()
            // What the walk of a process before left to this one (`leave`).
            || !self.dirty.is_empty();
        if !waits {
            self.boot.remember()?;
            self.unproven = None;
        }
        Ok(())
    }

    /// Passes the operator's wish to fail over on.
    pub(super) fn ask_failover(&mut self, reply: FailoverReply, patience: Duration) {
        let sent = match &self.session {
            Some(session) => session.send(&SourceMessage::Delete).map_err(|e| e.to_string()),
            None => Err("the destination cannot be reached".to_owned()),
        };
        match sent {
            Ok(()) => {
                self.failing = Some((reply, Instant::now() + patience));
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// A destination that has not failed over in time is replicated to further:
    /// if it does so after all, it ends the session, and says why.
    pub(super) fn give_up_failover(&mut self) {
        if let Some((reply, _)) = self.failing.take_if(|(_, until)| Instant::now() >= *until) {
            tracing::warn!("the destination did not fail over in time; replication goes on");
            let _ = reply.send(Err("the destination does not answer".to_owned()));
        }
    }
}
