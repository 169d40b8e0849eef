//! Runs one scenario for scripts/instructions.sh, which counts its instructions with callgrind; without an argument, names all.

use std::process::ExitCode;

use proxyvpn_engine::harness::instructions;

fn main() -> ExitCode {
    match std::env::args().nth(1).filter(|argument| !argument.starts_with('-')) {
        Some(scenario) if instructions::run(&scenario) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
        None => {
            println!("{}", instructions::SCENARIOS.join("\n"));
            ExitCode::SUCCESS
        }
    }
}
