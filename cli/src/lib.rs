//! `fairway`: the command line, and every program of the mesh in one binary.
//!
//! Which program it is follows from the name it is started under (`ztunnel`, `fairway-cni`, …) or from its first argument
//! (`fairway ztunnel proxy`). One binary means one build for a newcomer, and a lab that can start anything from itself.

#![forbid(unsafe_code)]

mod apps;
mod args;
mod check;
mod cluster;
mod component;
mod counters;
mod debug;
mod demo;
mod dump;
mod install;
mod lab_commands;
mod loopback;
mod mesh;
mod output;
mod status;
mod top;
mod why;

use std::{ffi::OsString, path::Path, process::ExitCode};

use clap::Parser;

/// Runs the program that the arguments name.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let (name, rest) = split(&arguments);
    match name.as_str() {
        "fairway-cni" => cni_plugin::plugin_main(),
        "fairway-node" => cni_plugin::agent_main(rest),
        "fairwayd" => control_plane::main(rest),
        "lab-init" => lab::supervisor::init_main(&text(&rest)),
        "lab-probe" => mesh_net::isolate::probe_child_main(),
        "lab-ptp" => lab::plugin::main(),
        lab::supervisor::SUPERVISOR => lab::supervisor::supervisor_main(&text(&rest)),
        "ztunnel" => ztunnel::main(rest),
        _ => command_line(arguments),
    }
}

/// The program's name and its arguments: `argv[0]` if that names a program, else the first argument.
fn split(arguments: &[OsString]) -> (String, Vec<OsString>) {
    const PROGRAMS: [&str; 8] = [
        "fairway-cni",
        "fairway-node",
        "fairwayd",
        "lab-init",
        "lab-probe",
        "lab-ptp",
        lab::supervisor::SUPERVISOR,
        "ztunnel",
    ];
    let base = |s: &OsString| Path::new(s).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let own = arguments.first().map(base).unwrap_or_default();
    if PROGRAMS.contains(&own.as_str()) {
        return (own, arguments.get(1..).unwrap_or_default().to_vec());
    }
    let first = arguments.get(1).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    (first, arguments.get(2..).unwrap_or_default().to_vec())
}

fn text(arguments: &[OsString]) -> Vec<String> {
    arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect()
}

fn command_line(arguments: Vec<OsString>) -> ExitCode {
    let args = match args::Args::try_parse_from(args::flags_last(arguments)) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are not failures; clap knows which stream and colour.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let outcome = match args.command {
        args::Command::App(app) => apps::run(app),
        args::Command::Check(query) => check::run(&query),
        args::Command::Debug(debug) => debug::run(debug),
        args::Command::Demo(options) => demo::run(&options),
        args::Command::Dump(query) => dump::run(&query),
        args::Command::Install(options) => install::run(&options),
        args::Command::Lab(command) => lab_commands::run(command),
        args::Command::Status(query) => status::run(&query),
        args::Command::Top(query) => top::run(&query),
        args::Command::Uninstall(options) => install::uninstall(&options),
        args::Command::Version => {
            output::say!("fairway {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        args::Command::Upgrade(options) => install::upgrade(&options),
        args::Command::Why(query) => why::run(&query),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fairway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(arguments: &[&str]) -> (String, usize) {
        let owned: Vec<OsString> = arguments.iter().map(Into::into).collect();
        let (name, rest) = split(&owned);
        (name, rest.len())
    }

    #[test]
    fn the_name_decides_before_the_first_argument() {
        assert_eq!(named(&["/opt/cni/bin/fairway-cni"]), ("fairway-cni".to_owned(), 0));
        assert_eq!(named(&["ztunnel", "proxy", "ztunnel"]), ("ztunnel".to_owned(), 2));
        assert_eq!(named(&["fairway", "ztunnel", "proxy"]), ("ztunnel".to_owned(), 1));
        assert_eq!(named(&["fairway", "demo"]), ("demo".to_owned(), 0));
        assert_eq!(named(&[]), (String::new(), 0));
    }
}
