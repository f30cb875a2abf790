//! A terminal's whole screen, drawn over in place: nothing flickers, nothing
//! scrolls, and what was there before is there again at the end.

use std::io::{self, Write};

use rustix::termios::tcgetwinsize;

/// The other screen, which has no history; no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// As terminals have been for long, where this one does not say.
const SIZE: (usize, usize) = (80, 24);

/// The screen is ours while this lives.
pub(super) struct Screen(());

impl Screen {
    pub(super) fn enter() -> io::Result<Self> {
        write(ENTER)?;
        Ok(Self(()))
    }

    /// Shows `page`, as much of it as there is room for.
    pub(super) fn draw(&self, page: &str) -> io::Result<()> {
        write(&frame(page, size()))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // When the terminal is gone, there is nothing to put back.
        let _ = write(LEAVE);
    }
}

/// In one piece, so that no half of it is ever seen.
fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Columns and rows. Asked each time: the window may have been resized.
fn size() -> (usize, usize) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => SIZE,
    }
}

/// What draws `page` from the upper left corner, over whatever stands there.
fn frame(page: &str, (columns, rows): (usize, usize)) -> String {
    let lines: Vec<&str> = page.lines().collect();
    let mut text = String::from("\x1b[H");
    let shown = if lines.len() > rows { rows.saturating_sub(1) } else { lines.len() };
    for (at, line) in lines.iter().take(shown).enumerate() {
        text.push_str(if at == 0 { "" } else { "\r\n" });
        text.push_str(&cut(line, columns));
        text.push_str("\x1b[K");
    }
    if shown < lines.len() {
        let rest = format!("… {} more lines: enlarge the window", lines.len() - shown);
        text.push_str(&format!("\r\n{}\x1b[K", cut(&rest, columns)));
    }
    text.push_str("\x1b[J");
    text
}

/// A line that does not wrap, which would scroll. (By characters: those of paths
/// in other scripts may be wider than one column.)
fn cut(line: &str, columns: usize) -> String {
    if line.chars().count() <= columns {
        return line.to_owned();
    }
    line.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_drawn_over_the_last_one() {
        assert_eq!(frame("a\nbc", (80, 24)), "\x1b[Ha\x1b[K\r\nbc\x1b[K\x1b[J");
    }

    #[test]
    fn what_has_no_room_is_cut_and_said() {
        let drawn = frame("first line\n2\n3\n4", (6, 3));
        assert_eq!(drawn, "\x1b[Hfirst…\x1b[K\r\n2\x1b[K\r\n… 2 m…\x1b[K\x1b[J");
        assert_eq!(frame("äöü", (3, 1)), "\x1b[Häöü\x1b[K\x1b[J");
    }
}
