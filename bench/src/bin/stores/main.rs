//! Measures the embedded stores that could hold the source's index and the
//! destination's objects map: the same rows, the same transactions, each store
//! in a process of its own.
//!
//! `stores [--objects N] [--directory DIR] [--kills N]` prints a Markdown
//! table. DIR (default: the current directory) should lie on the file system
//! that would hold the state; about 2 KiB an object are needed there.

mod measure;
mod store;
mod survive;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::measure::Figures;
use crate::store::Kind;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        // What the program calls itself with, in processes of their own.
        ["fill", kind, path, objects] => {
            measure::fill(kind.parse()?, Path::new(path), objects.parse()?)
        }
        ["reopen", kind, path, objects] => {
            measure::reopen(kind.parse()?, Path::new(path), objects.parse()?)
        }
        ["append", kind, path] => survive::append(kind.parse()?, Path::new(path)),
        ["count", kind, path] => survive::count(kind.parse()?, Path::new(path)),
        _ => compare(&Options::parse(&words)?),
    }
}

/// What the user asked for.
struct Options {
    objects: u64,
    directory: PathBuf,
    kills: u32,
}

impl Options {
    fn parse(words: &[&str]) -> anyhow::Result<Self> {
        let mut options = Self { objects: 1_000_000, directory: ".".into(), kills: 10 };
        for pair in words.chunks(2) {
            match *pair {
                ["--objects", value] => options.objects = value.parse().context("--objects")?,
                ["--directory", value] => options.directory = value.into(),
                ["--kills", value] => options.kills = value.parse().context("--kills")?,
                _ => bail!("usage: stores [--objects N] [--directory DIR] [--kills N]"),
            }
        }
        ensure!(
            options.objects >= store::HALF as u64,
            "--objects must be at least {}",
            store::HALF
        );
        Ok(options)
    }
}

fn compare(options: &Options) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        eprintln!("{kind}: {} objects, as many entries", options.objects);
        let place = tempfile::tempdir_in(&options.directory)?;
        let path = place.path().join("store");
        let objects = options.objects.to_string();
        let mut figures: Figures = call(&["fill", kind.word(), text(&path)?, &objects])?;
        figures.extend(call::<Figures>(&["reopen", kind.word(), text(&path)?, &objects])?);
        figures.extend(survive::kill_repeatedly(kind, &path, options)?);
        rows.push((kind, figures));
    }
    print_table(&rows);
    Ok(())
}

/// Runs this program again and reads the JSON it prints.
fn call<T: serde::de::DeserializeOwned>(arguments: &[&str]) -> anyhow::Result<T> {
    let output = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "{arguments:?} ended with {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("the directory's path is not UTF-8")
}

/// A row a figure, a column a store.
fn print_table(columns: &[(Kind, Figures)]) {
    let titles: Vec<String> = columns.iter().map(|(kind, _)| kind.to_string()).collect();
    println!("| | {} |", titles.join(" | "));
    println!("|---|{}", "---:|".repeat(columns.len()));
    let Some((_, first)) = columns.first() else {
        return;
    };
    for (i, (name, _)) in first.iter().enumerate() {
        let cells: Vec<&str> = columns
            .iter()
            .map(|(_, figures)| figures.get(i).map_or("", |(_, value)| value.as_str()))
            .collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
}
