//! Holds `docs/man/proxyctl.1` against the command line.

use std::collections::BTreeSet;

use clap::Command;

use crate::args;
use crate::exit::Exit;

const PAGE: &str = include_str!("../../docs/man/proxyctl.1");

fn options(command: &Command, into: &mut BTreeSet<String>) {
    for argument in command.get_arguments() {
        into.extend(argument.get_long().map(str::to_owned));
        into.extend(argument.get_visible_aliases().into_iter().flatten().map(str::to_owned));
    }
    command.get_subcommands().for_each(|command| options(command, into));
}

fn verbs(command: &Command, into: &mut BTreeSet<String>) {
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        into.insert(verb.get_name().to_owned());
        verbs(verb, into);
    }
}

#[test]
fn the_page_has_every_option_and_no_other() {
    let mut known = BTreeSet::new();
    let mut command = args::command();
    command.build();
    options(&command, &mut known);
    // Long options stand as "-name" after the macro Fl.
    let described: BTreeSet<String> = PAGE
        .lines()
        .filter(|line| line.starts_with(".It Fl"))
        .flat_map(str::split_whitespace)
        .filter_map(|word| word.strip_prefix('-'))
        .map(str::to_owned)
        .collect();
    assert_eq!(known, described);
}

#[test]
fn the_page_has_every_verb_and_exit_code() {
    let mut known = BTreeSet::new();
    verbs(&args::command(), &mut known);
    for verb in known {
        assert!(
            PAGE.lines().any(|line| line.starts_with(".Cm") && line.split([' ', '|']).any(|word| word == verb)),
            "{verb}"
        );
    }
    for (code, meaning) in Exit::ALL {
        assert!(PAGE.contains(&format!(".It {}\n{meaning}\n", code as u8)), "{meaning}");
    }
}
