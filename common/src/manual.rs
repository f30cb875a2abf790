//! The programs' arguments; and shell completions and man pages, made from the same
//! definitions: what they say is what the program takes.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, Command, Parser, Subcommand};
use clap_complete::Shell;
use clap_mangen::Man;

/// The shells that completions are written for.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];
/// The manual's name, at the foot of each page.
const MANUAL: &str = "replicator";

/// Arguments of the hidden subcommand `generate`, for packagers.
#[derive(Clone, Debug, Args)]
pub struct Generate {
    /// What is written
    #[command(subcommand)]
    pub what: What,
}

/// What is written.
#[derive(Clone, Debug, Subcommand)]
pub enum What {
    /// Completions for bash, zsh and fish
    Completions {
        /// Made when missing
        directory: PathBuf,
    },
    /// Man pages: one for the program, and one for each of its subcommands
    Man {
        /// Made when missing
        directory: PathBuf,
    },
}

/// The arguments of this process. Wrong ones end it with status 2 and one line.
pub fn parse<P: Parser>() -> P {
    let error = match P::try_parse() {
        Ok(arguments) => return arguments,
        Err(error) => error,
    };
    // Asked for, or nothing was said at all: help, or the version.
    let help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if help || !error.use_stderr() {
        error.exit();
    }
    let program = P::command().get_name().to_owned();
    let said = one_line(&error.to_string(), &program);
    // What else stands there could not be read; this word means the same anywhere.
    let line = match std::env::args_os().any(|word| word == "--json") {
        true => serde_json::json!({ "Error": said, "ExitStatus": 2 }).to_string(),
        false => format!("{program}: {said}"),
    };
    // When nobody reads it, the status still says so.
    let _ = writeln!(io::stderr(), "{line}");
    std::process::exit(2);
}

/// What is wrong, and any tip, without the usage, which the help says better.
fn one_line(text: &str, program: &str) -> String {
    let lines = text.lines().map(str::trim);
    let (usage, said): (Vec<_>, Vec<_>) = lines
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .partition(|line| line.starts_with("Usage:"));
    // Which of the subcommands is the words before any argument.
    let words = usage.first().and_then(|line| line.strip_prefix("Usage: ")).unwrap_or(program);
    let words: Vec<_> =
        words.split(' ').take_while(|word| !word.starts_with(['-', '<', '['])).collect();
    let said = said.join(" ").replace(" tip: ", "; ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    format!("{said} (see `{} --help`)", words.join(" "))
}

/// Writes what was asked for of `command`.
///
/// # Errors
/// When it cannot be written; the directory is named.
pub fn generate(command: Command, what: &Generate) -> io::Result<()> {
    let (directory, written) = match &what.what {
        What::Completions { directory } => (directory, completions(command, directory)),
        What::Man { directory } => (directory, man(command, directory)),
    };
    written.map_err(|error| {
        let what = format!("cannot write to {}: {error}", directory.display());
        io::Error::new(error.kind(), what)
    })
}

fn completions(command: Command, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    // clap takes names that live as long as the process, which is about to end.
    let name: &'static str = command.get_name().to_owned().leak();
    let shown = command.get_subcommands().filter(|one| !one.is_hide_set());
    // Hidden ones would be offered.
    let mut command = Command::new(name)
        .args(command.get_arguments().cloned())
        .subcommands(shown.cloned().collect::<Vec<_>>());
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut command, name, directory)?;
    }
    Ok(())
}

fn man(mut command: Command, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    // So that each page says all that its command takes, and by its full name.
    command.build();
    page(&command, directory)
}

fn page(command: &Command, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let source = format!("replicator {}", env!("CARGO_PKG_VERSION"));
    let mut text = Vec::new();
    // Without a date: the same source makes the same pages.
    let rendered = Man::new(command.clone()).title(name.to_uppercase());
    rendered.source(source).manual(MANUAL).render(&mut text)?;
    fs::write(directory.join(format!("{name}.1")), text)?;
    for below in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        // Every program has one, and `--help` says the same.
        if below.get_name() != "help" {
            page(below, directory)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Command {
        Command::new("sample")
            .about("Does a thing")
            .subcommand(Command::new("do").about("Does it"))
            .subcommand(Command::new("generate").hide(true))
    }

    #[test]
    fn a_page_for_each_command_that_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("man");
        let what = Generate { what: What::Man { directory: at.clone() } };
        generate(sample(), &what).unwrap();
        let mut names: Vec<_> = fs::read_dir(&at)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["sample-do.1", "sample.1"]);
        let text = fs::read_to_string(at.join("sample.1")).unwrap();
        assert!(text.contains("Does a thing") && !text.contains("generate"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_one_line() {
        let said = |words: &[&str]| {
            let error = sample().subcommand_required(true).try_get_matches_from(words).unwrap_err();
            one_line(&error.to_string(), "sample")
        };
        let wrong = said(&["sample", "do", "--fast"]);
        assert_eq!(wrong, "unexpected argument '--fast' found (see `sample do --help`)");
        let wrong = said(&["sample", "doo"]);
        assert!(wrong.starts_with("unrecognized subcommand 'doo'; "), "{wrong}");
        assert!(said(&["sample"]).ends_with("(see `sample --help`)"));
    }

    #[test]
    fn completions_for_each_shell() {
        let directory = tempfile::tempdir().unwrap();
        let what = What::Completions { directory: directory.path().to_owned() };
        generate(sample(), &Generate { what }).unwrap();
        for name in ["sample.bash", "_sample", "sample.fish"] {
            let text = fs::read_to_string(directory.path().join(name)).unwrap();
            assert!(text.contains("do") && !text.contains("generate"), "{name}: {text}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_said_with_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let what = What::Man { directory: file.path().to_owned() };
        let error = generate(sample(), &Generate { what }).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }
}
