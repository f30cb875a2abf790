//! The end-to-end tests: real daemons on real mounts. One program, so that it is
//! linked once and what waits in one test leaves the machine to the others (see
//! `replicator_tests::serial`).

mod bad_disks;
mod bad_input;
mod capture_traps;
mod clock_steps;
mod disks;
mod failover_faults;
mod figures;
mod halt;
mod handover;
mod lost_events;
mod monitoring;
mod network;
mod never_still;
mod notify;
mod operations;
mod power;
mod readonly_failover;
mod reconcile;
mod restart;
mod resume;
mod scale;
mod several;
mod slow_link;
mod source_power;
mod systemd;
mod torture;
mod traps;
mod two_hosts;
mod unprivileged;
mod unprivileged_workloads;
mod vanished;
mod verify;
mod watermark;
mod workloads;
