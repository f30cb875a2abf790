//! The console in a browser: real replications, driven by keyboard through the
//! page.

mod elsewhere;
mod keyboard;
mod looks;
