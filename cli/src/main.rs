//! `proxyctl`: the command line of proxyvpn.

mod agent;
mod args;
mod bus;
mod connect;
mod doctor;
mod events;
mod exit;
mod flows;
mod keep;
mod lockdown;
mod logs;
mod options;
mod plan;
mod profile;
mod progress;
mod rescue;
mod secret;
mod ssh;
mod status;
mod sys;
mod text;
mod torvm;
mod wait;

#[cfg(test)]
mod man;

use std::io::Write as _;
use std::process::ExitCode;

use args::{Command, Shell};
use exit::{Exit, Failure, Outcome};

fn main() -> ExitCode {
    let cli = args::parse();
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failure, format!("cannot start: {error}")))
        .and_then(|runtime| {
            let outcome = runtime.block_on(run(&cli.command));
            // A thread that still reads the terminal must not hold up the end.
            runtime.shutdown_background();
            outcome
        });
    let exit = outcome.unwrap_or_else(|failure| {
        let _ = std::io::stderr().lock().write_all(failure.message().as_bytes());
        failure.exit
    });
    ExitCode::from(exit as u8)
}

async fn run(command: &Command) -> Outcome {
    match command {
        Command::Connect(args) => connect::connect(args).await,
        Command::Disconnect(args) => connect::disconnect(args).await,
        Command::Reconnect(args) => connect::reconnect(args).await,
        Command::Status(args) => status::status(args).await,
        Command::Profile(verb) => profile::profile(verb).await,
        Command::Plan(args) => plan::plan(args).await,
        Command::Logs(args) => logs::logs(args).await,
        Command::Flows(args) => flows::flows(args).await,
        Command::Doctor(args) => doctor::doctor(args).await,
        Command::Lockdown(args) => lockdown::lockdown(args).await,
        Command::TorVm(verb) => torvm::torvm(verb).await,
        Command::Rescue => rescue::rescue().await,
        Command::Completions { shell } => completions(*shell),
    }
}

fn completions(shell: Shell) -> Outcome {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "proxyctl", &mut script);
    text::out(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}
