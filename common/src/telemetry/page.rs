//! Puts the page together from its parts. Pure.

use std::collections::BTreeMap;

use super::series::{DESTINATION, SOURCE};
use crate::status::Status;

/// One page of the parts' metrics, ordered by name, without the series of
/// configurations that are not in `all`.
pub fn compose(parts: &[&str], all: &[Status]) -> String {
    let pair = |status: &Status| {
        let source = marker(SOURCE, status.source_file_system_id.as_str());
        [source, marker(DESTINATION, status.destination_file_system_id.as_str())]
    };
    let known: Vec<_> = all.iter().map(pair).collect();
    let mut families: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for part in parts {
        let mut family = "";
        for line in part.lines().filter(|line| !line.is_empty()) {
            if let Some(name) = described(line) {
                family = name;
            }
            if is_shown(line, &known) {
                families.entry(family).or_default().push(line);
            }
        }
    }
    let mut page = String::new();
    for lines in families.into_values() {
        if lines.iter().all(|line| line.starts_with('#')) {
            continue;
        }
        for line in lines {
            page.push_str(line);
            page.push('\n');
        }
    }
    page
}

/// The name of a HELP or TYPE line.
fn described(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "))?;
    rest.split(' ').next()
}

/// A series of no configuration, or of one that there is. (A source may be in another
/// with the same id, and another replica.)
fn is_shown(line: &str, known: &[[String; 2]]) -> bool {
    if line.starts_with('#') || !line.contains(&format!("{SOURCE}=\"")) {
        return true;
    }
    known.iter().any(|pair| pair.iter().all(|label| line.contains(label.as_str())))
}

fn marker(label: &str, id: &str) -> String {
    format!("{label}=\"{id}\"")
}
