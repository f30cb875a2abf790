# One command a chore; `just` alone lists them.

_default:
    @just --list

# The programs, optimised.
build:
    cargo build --release --locked --workspace --bins

# All tests (as root: the end-to-end tests mount file systems).
test:
    cargo test --workspace --locked

# Tests that need no root.
test-unit:
    cargo test --workspace --locked --lib --exclude replicator-tests

# End-to-end tests whose name contains FILTER, with their output.
e2e FILTER="":
    cargo test --locked -p replicator-tests --tests -- --nocapture {{ FILTER }}

# Replays a random workload: the seed that a failed test printed, and the test as it was printed, `workloads::…`.
replay SEED TEST:
    REPLICATOR_SEED={{ SEED }} cargo test --locked -p replicator-tests --tests -- --exact --nocapture {{ TEST }}

# Simulates SEEDS replications in virtual time, with faults everywhere.
simulate SEEDS="20000":
    REPLICATOR_SEEDS={{ SEEDS }} cargo test --locked -p replicator-simulation --test seeds -- --nocapture

# Replays one simulated replication: the seed that a failed simulation printed.
simulate-one SEED:
    REPLICATOR_SEED={{ SEED }} cargo test --locked -p replicator-simulation --test seeds -- --nocapture

# Kills both daemons at random instants under a random workload for so long (as root). A SEED, which a
# failed run prints, names the victims, the moments and the workload.
torture SECONDS="600" SEED="":
    REPLICATOR_TORTURE_SECONDS={{ SECONDS }} REPLICATOR_SEED={{ SEED }} cargo test --locked -p replicator-tests --test end_to_end torture:: -- --nocapture

# Random weather between two daemons for SECONDS; a failed run prints its SEED.
network SECONDS="600" SEED="":
    REPLICATOR_NETWORK_SECONDS={{ SECONDS }} {{ if SEED == "" { "" } else { "REPLICATOR_SEED=" + SEED } }} \
        cargo test --locked -p replicator-tests --test end_to_end -- --exact --nocapture network::random_weather

# A directory, hard links and a backlog of OBJECTS under a limit of memory (as root; 20 KB of disk an object).
scale OBJECTS="1000000":
    REPLICATOR_SCALE={{ OBJECTS }} cargo test --release --locked -p replicator-tests --test end_to_end scale:: -- --nocapture --test-threads 1

# Looks for inputs that break TARGET (frame, journal_record, log_record, session or replies) for SECONDS, or
# until stopped. Needs nightly and cargo-fuzz: `rustup toolchain install nightly`, `cargo install cargo-fuzz`.
# An input that breaks it is written to fuzz/artifacts/TARGET: once mended, it goes into fuzz/corpus/TARGET,
# which `cargo test` replays on stable. What only reaches new code stays in target/fuzz/TARGET for the next
# run. Without a sanitizer, since the code is safe Rust: it is several times as fast.
fuzz TARGET SECONDS="0":
    mkdir -p target/fuzz/{{ TARGET }}
    cargo +nightly fuzz run --fuzz-dir fuzz --sanitizer none {{ TARGET }} target/fuzz/{{ TARGET }} fuzz/corpus/{{ TARGET }} -- \
        -max_total_time={{ SECONDS }} -timeout=10 -rss_limit_mb=1024

# Lints, as CI has them.
lint:
    cargo clippy --workspace --all-targets --locked -- --deny warnings

# Formats all code.
fmt:
    cargo fmt --all

# The documentation of all crates, private items excepted.
doc:
    RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --locked

# Man pages and shell completions, into target/man and target/completions.
man:
    cargo build --release --locked --workspace --bins
    for program in replicator replicator-src replicator-dst; do \
        target/release/$program generate man target/man && \
        target/release/$program generate completions target/completions || exit 1; \
    done

# Debian packages of the optimised programs, into OUT.
deb OUT="target/debian": build
    deploy/debian/build {{ OUT }}

# A container image, with podman or docker.
image NAME="replicator:local":
    $(command -v podman || command -v docker) build -f deploy/container/Containerfile -t {{ NAME }} .

# What `bench` compares with, on Debian (as root). Whatever is missing, its rows say so. What apt lacks
# comes from crates.io, into REPLICATOR_BENCH_CACHE.
bench-install:
    apt-get install --yes --no-install-recommends rsync openssh-server lsyncd syncthing fpart rclone \
        xfsprogs btrfs-progs iproute2
    cargo install xcp --locked --version 0.24.9 --root "${REPLICATOR_BENCH_CACHE:-$HOME/.cache/replicator-bench}"

# Side by side with its peers; rewrites bench/RESULTS.md and results.json (as root; hours, unless ONLY, as in
# small,lag, names workloads; `just bench-list` names them).
bench ONLY="" ROUNDS="5":
    cargo build --release --locked -p replicator -p replicator-src -p replicator-dst -p replicator-bench
    cargo run --release --locked -p replicator-bench -- --rounds {{ ROUNDS }} --output bench \
        {{ if ONLY == "" { "" } else { "--only " + ONLY } }}

# The same, small and in one round, to standard output alone (as root; some 10 minutes).
bench-quick ONLY="":
    cargo build --release --locked -p replicator -p replicator-src -p replicator-dst -p replicator-bench
    cargo run --release --locked -p replicator-bench -- --quick {{ if ONLY == "" { "" } else { "--only " + ONLY } }}

# The names of workloads and peers, and which of them are installed.
bench-list:
    cargo run --release --locked -p replicator-bench -- --list

# The hot pieces alone: events, journal, plan, chunks, frames (no root).
bench-pieces FILTER="":
    cargo bench --locked -p replicator-bench --bench pieces -- {{ FILTER }}

# Everything that CI checks.
ci:
    .ci/run
