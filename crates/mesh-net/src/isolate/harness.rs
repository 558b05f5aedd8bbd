//! Tests on the real kernel, without root: a test binary that runs itself again inside namespaces.

use std::{env, panic, path::Path, process::ExitCode};

use super::{Isolated, Refusal, probe, probe_child_main};

const STAGE: &str = "FAIRWAY_TEST_STAGE";
const MUST_RUN: &str = "FAIRWAY_CI";
const PROBE_ARGUMENT: &str = "--probe-namespaces";

/// `main` of a test binary with `harness = false`. Each test runs as root of fresh namespaces, in a process of its own. Where the
/// kernel refuses, one `skipped: <cause>` line is printed and the tests pass, unless `FAIRWAY_CI=1` forbids skipping.
/// Knows `--list`, `--exact` and name filters, so that `cargo test NAME` works.
pub fn test_main(tests: &[(&str, fn())]) -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == PROBE_ARGUMENT) {
        return probe_child_main();
    }
    if let Ok(name) = env::var(STAGE) {
        return run_inside(tests, &name);
    }
    let selected: Vec<&str> = tests.iter().map(|(name, _)| *name).filter(|name| is_selected(name, &args)).collect();
    if args.iter().any(|a| a == "--list") {
        selected.iter().for_each(|name| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let Ok(program) = env::current_exe() else { return fail("this test binary has no path") };
    if let Err(refusal) = probe(&program, &[PROBE_ARGUMENT]) {
        return skip(&refusal);
    }
    let failed = selected.iter().filter(|name| !run_outside(&program, name)).count();
    println!("\ntest result: {} passed; {failed} failed", selected.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn is_selected(name: &str, args: &[String]) -> bool {
    let exact = args.iter().any(|a| a == "--exact");
    let mut filters = args.iter().filter(|a| !a.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|f| if exact { name == f } else { name.contains(f.as_str()) })
}

fn skip(refusal: &Refusal) -> ExitCode {
    if env::var(MUST_RUN).is_ok_and(|v| v == "1") {
        return fail(&format!("these tests must run here, but {refusal}"));
    }
    println!("skipped: {refusal}");
    ExitCode::SUCCESS
}

fn fail(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::FAILURE
}

fn run_outside(program: &Path, name: &str) -> bool {
    let mut isolated = Isolated::new(program);
    isolated.command().env(STAGE, name);
    isolated.die_with_parent();
    let passed = match isolated.spawn() {
        Ok(mut child) => child.wait().is_ok_and(|status| status.success()),
        Err(error) => {
            eprintln!("{error}: {}", error.source);
            false
        }
    };
    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    passed
}

fn run_inside(tests: &[(&str, fn())], name: &str) -> ExitCode {
    let Some((_, test)) = tests.iter().find(|(candidate, _)| *candidate == name) else {
        return fail(&format!("no test {name}"));
    };
    if panic::catch_unwind(test).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
