//! Puts the page together from its parts. Pure.

use std::collections::BTreeMap;

use super::series::SOURCE;
use crate::status::Status;

/// One page of the parts' metrics, ordered by name, without the series of
/// configurations that are not in `all`.
pub fn compose(parts: &[&str], all: &[Status]) -> String {
    let known: Vec<String> =
        all.iter().map(|status| marker(status.source_file_system_id.as_str())).collect();
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

/// A series of no configuration, or of one that there is.
fn is_shown(line: &str, known: &[String]) -> bool {
    if line.starts_with('#') || !line.contains(&marker_start()) {
        return true;
    }
    known.iter().any(|id| line.contains(id.as_str()))
}

fn marker_start() -> String {
    format!("{SOURCE}=\"")
}

fn marker(id: &str) -> String {
    format!("{}{id}\"", marker_start())
}
