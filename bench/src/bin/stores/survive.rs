//! What is left after `kill -9`. (It shows that recovery works and what it
//! takes; what power loss would do, it cannot show: the page cache survives.)

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::measure::Figures;
use crate::store::{HALF, Kind, Rows};
use crate::{Options, call, text};

/// What [`count`] found.
#[derive(Serialize, Deserialize)]
struct Counted {
    objects: u64,
    entries: u64,
    open_seconds: f64,
}

/// Opens the store and counts what is in it.
pub fn count(kind: Kind, path: &Path) -> anyhow::Result<()> {
    let begin = Instant::now();
    let store = kind.open(path)?;
    let open_seconds = begin.elapsed().as_secs_f64();
    let (objects, entries) = store.scan()?;
    println!("{}", serde_json::to_string(&Counted { objects, entries, open_seconds })?);
    Ok(())
}

/// Adds rows until it is killed; says after each commit how many objects there are.
pub fn append(kind: Kind, path: &Path) -> anyhow::Result<()> {
    let mut store = kind.open(path)?;
    let (mut objects, _) = store.scan()?;
    let mut output = std::io::stdout();
    loop {
        writeln!(output, "{objects}")?;
        store.commit(&Rows::of(objects..objects + HALF as u64, 1))?;
        objects += HALF as u64;
    }
}

/// Kills a writer again and again, at random moments, and looks at the rest.
pub fn kill_repeatedly(kind: Kind, path: &Path, options: &Options) -> anyhow::Result<Figures> {
    let mut random = StdRng::seed_from_u64(3);
    let (mut lost, mut torn, mut committed) = (0, 0, 0);
    let mut slowest = 0f64;
    for _ in 0..options.kills {
        let delay = Duration::from_millis(random.random_range(50..1500));
        let (first, acknowledged) = kill_one(kind, path, delay)?;
        let found: Counted = call(&["count", kind.word(), text(path)?])?;
        committed += (acknowledged - first) / HALF as u64;
        lost += u32::from(found.objects < acknowledged);
        torn += u32::from(
            found.objects != found.entries || !(found.objects - first).is_multiple_of(HALF as u64),
        );
        slowest = slowest.max(found.open_seconds);
    }
    eprintln!("  killed {} times", options.kills);
    let verdict = format!("{lost} lost, {torn} torn ({committed} commits)");
    Ok(vec![
        (format!("kill -9, {} times", options.kills), verdict),
        ("reopen after kill -9, slowest, s".to_owned(), format!("{slowest:.2}")),
    ])
}

/// Starts a writer, kills it `delay` after its first word; returns how many
/// objects it found and how many it last said were committed.
fn kill_one(kind: Kind, path: &Path, delay: Duration) -> anyhow::Result<(u64, u64)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["append", kind.word(), text(path)?])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
    let first: u64 = lines.next().context("the writer said nothing")??.parse()?;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(delay);
        child.kill().and_then(|()| child.wait())
    });
    let mut last = first;
    for line in lines {
        last = line?.parse()?;
    }
    killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
    Ok((first, last))
}
