//! Flags before the command, as `kubectl` takes them: `fairway --context c status` is `fairway status --context c`.

use std::ffi::OsString;

/// Each takes a value.
const EARLY: [&str; 4] = ["--context", "--kubeconfig", "--namespace", "-n"];

/// Moves the flags of [`EARLY`] that stand before the command behind it: whether the command has such a flag, its own grammar says.
pub(crate) fn flags_last(arguments: Vec<OsString>) -> Vec<OsString> {
    let mut rest = arguments.into_iter().peekable();
    let mut ordered: Vec<OsString> = rest.next().into_iter().collect();
    let mut early = Vec::new();
    while let Some(flag) = rest.next_if(|argument| is_early(&argument.to_string_lossy())) {
        let takes_next = EARLY.contains(&&*flag.to_string_lossy());
        early.push(flag);
        if takes_next {
            early.extend(rest.next());
        }
    }
    ordered.extend(rest.next());
    ordered.append(&mut early);
    ordered.extend(rest);
    ordered
}

fn is_early(argument: &str) -> bool {
    EARLY.iter().any(|flag| match argument.strip_prefix(flag) {
        Some("") => true,
        // A value that hangs on: `--context=c`, `-nc`.
        Some(value) => value.starts_with('=') || !flag.starts_with("--"),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    fn moved(line: &str) -> String {
        let moved = flags_last(line.split(' ').map(OsString::from).collect());
        moved.iter().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn flags_before_the_command_go_behind_it_and_nothing_else_moves() {
        for (line, wanted) in [
            ("fairway --context c status -o json", "fairway status --context c -o json"),
            ("fairway --context=c -nm --kubeconfig f check", "fairway check --context=c -nm --kubeconfig f"),
            ("fairway -n m why a b:80", "fairway why -n m a b:80"),
            ("fairway status --context c", "fairway status --context c"),
            ("fairway lab exec p -- x --context c", "fairway lab exec p -- x --context c"),
            ("fairway --help", "fairway --help"),
            ("fairway --contexts c status", "fairway --contexts c status"),
            ("fairway --context", "fairway --context"),
            ("fairway", "fairway"),
        ] {
            assert_eq!(moved(line), wanted);
        }
    }

    #[test]
    fn a_command_takes_them_from_before_and_one_without_them_refuses_them() {
        let parse = |line: &str| Args::try_parse_from(flags_last(line.split(' ').map(OsString::from).collect()));
        let Command::Status(query) = parse("fairway --context c --namespace m status").unwrap().command else {
            panic!("another command");
        };
        assert_eq!((query.connection.context.as_deref(), query.namespace.as_str()), (Some("c"), "m"));
        assert!(parse("fairway --context c version").is_err());
    }
}
