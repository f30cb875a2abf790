//! The tables of RESULTS.md: medians with least and most.

use std::fmt::Write;

use crate::machine::{Machine, State};
use crate::report::{Results, Run, RunResult, WorkloadReport};
use crate::workloads::{Figure, Outcome};

/// All of it.
pub fn markdown(results: &Results) -> String {
    let mut text = String::from("# Results\n\n");
    // Writing to a string cannot fail.
    let _ = head(results, &mut text);
    for workload in &results.workloads {
        let _ = table(workload, &mut text);
    }
    text
}

fn head(results: &Results, text: &mut String) -> std::fmt::Result {
    let machine = &results.machine;
    let kind = results.file_system.as_str();
    writeln!(text, "Written by `just bench`; raw figures in `results.json`.\n")?;
    if results.quick {
        writeln!(text, "**A quick run: it shows that all works, not how fast it is.**\n")?;
    }
    let Machine { processor, cores, memory, kernel } = machine;
    writeln!(text, "- {processor}, {cores} cores, {memory} GiB; Linux {kernel}")?;
    writeln!(
        text,
        "- Source and replica: {kind} on loop devices over files of one disk, the replica freshly made \
         for each run ({}); both ends on this machine, and what changes the source too.\n\
         - In rounds, peers interleaved, another one first in each; fewer, as its row says, for one that \
         takes long. Figures are medians (least to most). Below each table: what was measured, and the load \
         of the machine before.\n\
         - CPU is user and system time of all processes of both ends, by control group. Memory is the \
         most that they held of their own at once, looked at 20 times a second. Wire is what the loopback \
         or the line carried, both ways, with headers of IP and above. A pipe is no wire. Over the long path TCP runs with {}.\n",
        results.file_system_maker,
        results.tcp.as_str(),
    )?;
    writeln!(text, "| peer | version | how |\n|---|---|---|")?;
    for peer in &results.peers {
        let version = peer.version.as_deref().unwrap_or("not installed");
        writeln!(text, "| {} | {} | {} |", peer.name, escaped(version), escaped(&peer.settings))?;
    }
    writeln!(text)
}

/// A `|` would begin another cell.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

fn table(workload: &WorkloadReport, text: &mut String) -> std::fmt::Result {
    writeln!(text, "## `{}`: {}\n\n{}\n", workload.name, workload.title, workload.about)?;
    let outcomes = workload.runs.iter().filter_map(outcome);
    let mut columns: Vec<&Figure> = Vec::new();
    for figure in outcomes.flat_map(|outcome| &outcome.figures) {
        if !columns.iter().any(|column| column.name == figure.name) {
            columns.push(figure);
        }
    }
    let names: String = columns.iter().map(|column| format!(" {} |", column.name)).collect();
    writeln!(text, "| peer |{names}  |\n|---|{}---|", "---|".repeat(columns.len()))?;
    let mut peers: Vec<_> = workload.runs.iter().filter(|r| r.round == 1).collect();
    // The first round is in the order of the list.
    peers.dedup_by_key(|run| &run.peer);
    for peer in peers {
        writeln!(text, "{}", row(workload, &peer.peer, &columns))?;
    }
    let (rounds, State { commit, load }) = (workload.rounds, &workload.state);
    let plural = if rounds == 1 { "round" } else { "rounds" };
    writeln!(text, "\n{rounds} {plural}; commit {commit}; load {load}.")?;
    if !workload.excluded.is_empty() {
        writeln!(text, "\nWithout {}.", excluded(workload))?;
    }
    writeln!(text)
}

/// Who had no part in it, by reason.
fn excluded(workload: &WorkloadReport) -> String {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for (peer, why) in &workload.excluded {
        match reasons.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, peers)) => peers.push(peer),
            None => reasons.push((why, vec![peer])),
        }
    }
    let told = reasons.iter().map(|(why, peers)| format!("{} ({why})", peers.join(", ")));
    told.collect::<Vec<_>>().join("; ")
}

fn outcome(run: &Run) -> Option<&Outcome> {
    match &run.result {
        RunResult::Measured(outcome) => Some(outcome),
        RunResult::NotInstalled | RunResult::Failed(_) => None,
    }
}

fn row(workload: &WorkloadReport, peer: &str, columns: &[&Figure]) -> String {
    let runs = || workload.runs.iter().filter(|run| run.peer == peer);
    let outcomes = || runs().filter_map(outcome);
    let mut cells: Vec<String> = columns
        .iter()
        .map(|column| {
            let figures = outcomes().flat_map(|outcome| &outcome.figures);
            let values = figures.filter(|figure| figure.name == column.name).map(|f| f.value);
            spread(values, column.digits)
        })
        .collect();
    cells.push(escaped(&notes(runs(), workload.rounds)));
    format!("| {peer} | {} |", cells.join(" | "))
}

/// What is to be said of a peer's runs, each thing once.
fn notes<'a>(runs: impl Iterator<Item = &'a Run>, rounds: u32) -> String {
    let runs: Vec<_> = runs.collect();
    let mut notes: Vec<String> = Vec::new();
    if runs.len() < rounds as usize {
        notes.push(format!("{} of {rounds} rounds", runs.len()));
    }
    for run in runs {
        let note = match &run.result {
            RunResult::Measured(outcome) => outcome.note.clone(),
            RunResult::NotInstalled => Some("not installed".to_owned()),
            RunResult::Failed(error) => {
                let first = error.lines().next().unwrap_or_default();
                Some(format!("round {} failed: {first}", run.round))
            }
        };
        notes.extend(note.filter(|note| !notes.contains(note)));
    }
    notes.join("; ")
}

/// Median and, of several figures, the least and the most. What is not a number
/// was not reached, and counts as more than any.
fn spread(figures: impl Iterator<Item = f64>, digits: usize) -> String {
    let shown = |figure: f64| {
        if figure.is_nan() { "–".to_owned() } else { format!("{figure:.digits$}") }
    };
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    match figures[..] {
        [] => "–".to_owned(),
        [only] => shown(only),
        [least, .., most] => {
            let middle = figures.len() / 2;
            let median = if figures.len() % 2 == 1 {
                figures[middle]
            } else {
                (figures[middle - 1] + figures[middle]) / 2.0
            };
            format!("{} ({} to {})", shown(median), shown(least), shown(most))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn spreads() {
        assert_eq!(spread([].into_iter(), 1), "–");
        assert_eq!(spread([2.0].into_iter(), 1), "2.0");
        assert_eq!(spread([3.0, 1.0, 2.0].into_iter(), 1), "2.0 (1.0 to 3.0)");
        assert_eq!(spread([4.0, 1.0, 2.0, 3.0].into_iter(), 1), "2.5 (1.0 to 4.0)");
        assert_eq!(spread([3.0, f64::NAN, 2.0].into_iter(), 1), "3.0 (2.0 to –)");
    }
}
