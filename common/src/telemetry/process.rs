//! The `process_*` metrics that every Prometheus client has, from `/proc`.
//!
//! Written as text: CPU time is a counter with a fraction, which the `metrics`
//! crate has not.

use std::fmt::Write;
use std::fs;

/// What the kernel says of this process.
#[derive(Debug, Default, PartialEq)]
struct Process {
    cpu_seconds: Option<f64>,
    threads: Option<f64>,
    start_seconds: Option<f64>,
    virtual_bytes: Option<f64>,
    resident_bytes: Option<f64>,
    open_fds: Option<f64>,
    max_fds: Option<f64>,
}

/// The lines; what cannot be read is left out.
pub fn render() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let units = Units {
        ticks: rustix::param::clock_ticks_per_second() as f64,
        page: rustix::param::page_size() as f64,
    };
    let mut process =
        parse(&read("/proc/self/stat"), &read("/proc/stat"), &read("/proc/self/limits"), units);
    // One of them is the directory that is being read.
    process.open_fds =
        fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1) as f64);
    text(&process)
}

struct Units {
    ticks: f64,
    page: f64,
}

fn parse(stat: &str, system: &str, limits: &str, units: Units) -> Process {
    // The program's name may hold spaces and parentheses: fields are counted
    // from its end, the first being the third of proc(5).
    let fields: Vec<&str> =
        stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.trim().parse().ok());
    let booted = system
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|text| text.trim().parse::<f64>().ok());
    let user_and_system: Option<f64> =
        field(14).zip(field(15)).map(|(user, system): (f64, f64)| user + system);
    let started: Option<f64> = field(22);
    let pages: Option<f64> = field(24);
    Process {
        cpu_seconds: user_and_system.map(|ticks| ticks / units.ticks),
        threads: field(20),
        start_seconds: booted.zip(started).map(|(boot, ticks)| boot + ticks / units.ticks),
        virtual_bytes: field(23),
        resident_bytes: pages.map(|pages| pages * units.page),
        open_fds: None,
        max_fds: limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"))
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok()),
    }
}

fn text(process: &Process) -> String {
    let rows = [
        ("process_cpu_seconds_total", "counter", process.cpu_seconds),
        ("process_threads", "gauge", process.threads),
        ("process_start_time_seconds", "gauge", process.start_seconds),
        ("process_virtual_memory_bytes", "gauge", process.virtual_bytes),
        ("process_resident_memory_bytes", "gauge", process.resident_bytes),
        ("process_open_fds", "gauge", process.open_fds),
        ("process_max_fds", "gauge", process.max_fds),
    ];
    let mut page = String::new();
    for (name, kind, value) in rows {
        let Some(value) = value else { continue };
        let help = super::catalogue::help(name);
        // Writing to a string cannot fail.
        let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_past_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 400 4096000 25 \
                    18446744073709551615 1 1 0";
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096                 files\n";
        let units = Units { ticks: 100.0, page: 4096.0 };
        let process = parse(stat, "cpu 1 2\nbtime 1000\n", limits, units);
        let expected = Process {
            cpu_seconds: Some(3.0),
            threads: Some(9.0),
            start_seconds: Some(1004.0),
            virtual_bytes: Some(4_096_000.0),
            resident_bytes: Some(102_400.0),
            open_fds: None,
            max_fds: Some(1024.0),
        };
        assert_eq!(process, expected);
        assert_eq!(
            parse("", "", "Max open files unlimited", Units { ticks: 1.0, page: 1.0 }),
            Process::default()
        );
    }

    #[test]
    fn this_process_has_all() {
        let page = render();
        for name in [
            "process_cpu_seconds_total",
            "process_threads",
            "process_start_time_seconds",
            "process_virtual_memory_bytes",
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_max_fds",
        ] {
            let line = page.lines().find(|line| line.starts_with(&format!("{name} ")));
            let value: f64 =
                line.unwrap_or_default().split(' ').next_back().unwrap().parse().unwrap();
            assert!(value >= 0.0, "{name}");
        }
    }
}
