//! `proxyvpnd`: puts a whole machine behind an upstream.

use std::process::ExitCode;

use clap::Parser as _;
use proxyvpnd::app::{self, Args};

fn main() -> ExitCode {
    app::main(&Args::parse())
}
