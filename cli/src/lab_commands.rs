//! `fairway lab …`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::Context as _;
use lab::{
    components::Options,
    control::Lab as Running,
    protocol::{self, Request, Status},
};

use crate::{
    args::{Fault, Lab, Output},
    demo::refusal,
    output,
};

pub(crate) fn run(command: Lab) -> anyhow::Result<ExitCode> {
    match command {
        Lab::Up { name, nodes, files, ztunnel, certificate_ttl, log } => {
            let options = Options { nodes, certificate_ttl, ztunnels: ztunnel, log };
            return up(&name, &options, &files);
        }
        Lab::Apply { name, files } => return apply(&Running::find(&name)?, &files),
        Lab::Delete { name, pod, file } => {
            anyhow::ensure!(pod.is_some() || file.is_some(), "say which pod, or -f which file");
            let file = file.map(|f| f.display().to_string());
            Running::find(&name)?.ask(&Request::Delete { pod, file })?;
        }
        Lab::Label { name, object, label } => {
            Running::find(&name)?.ask(&label_request(&object, &label)?)?;
        }
        Lab::Exec { name, target, command } => {
            let code = Running::find(&name)?.exec(&target, command)?;
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        Lab::Pods { name, output } => print_pods(&Running::find(&name)?.status()?, output)?,
        Lab::Status { name, output } => print_status(&Running::find(&name)?.status()?, output)?,
        Lab::Traffic { name, source, target, connections, seconds, new_connections } => {
            return traffic(&Running::find(&name)?, &source, &target, connections, seconds, new_connections);
        }
        Lab::Logs { name, program, lines } => {
            crate::output::say!("{}", Running::find(&name)?.ask(&Request::Logs { name: program, lines })?.text);
        }
        Lab::Fault { name, fault } => {
            crate::output::say!("{}", Running::find(&name)?.ask(&Request::Fault(fault_request(fault)))?.text);
        }
        Lab::Down { name } => Running::find(&name)?.down()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, options: &Options, files: &[PathBuf]) -> anyhow::Result<ExitCode> {
    if let Some(refusal) = refusal() {
        anyhow::bail!("this kernel refuses a lab: {refusal}\n  (`fairway demo` runs on loopback here)");
    }
    // Read before anything is started: a missing file should cost nothing.
    let texts: Vec<(String, String)> = files.iter().map(|f| read(f)).collect::<anyhow::Result<_>>()?;
    let started = Instant::now();
    let lab = Running::start(name, options)?;
    let wrong = apply_all(&lab, texts, |_| ());
    if !wrong.is_empty() {
        wrong.iter().for_each(|line| eprintln!("{line}"));
        eprintln!("  the lab stays up; correct the file and `fairway lab apply -f` it, or `fairway lab down`");
        return Ok(ExitCode::FAILURE);
    }
    crate::output::say!("lab `{name}` is up ({})", output::took(started.elapsed()));
    print_pods(&lab.status()?, Output::Text)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn read(file: &Path) -> anyhow::Result<(String, String)> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok((file.display().to_string(), text))
}

/// Fails when a file is refused or the control plane finds fault with one, though the rest is in force.
fn apply(lab: &Running, files: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let texts: Vec<(String, String)> = files.iter().map(|f| read(f)).collect::<anyhow::Result<_>>()?;
    let wrong = apply_all(lab, texts, |report| crate::output::say!("{report}"));
    wrong.iter().for_each(|line| eprintln!("{line}"));
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Applies every file before it asks what is wrong with any: what one lacks may be in the next. Answers with what is wrong.
fn apply_all(lab: &Running, texts: Vec<(String, String)>, report: impl Fn(&str)) -> Vec<String> {
    let told = |error: &dyn std::error::Error| vec![format!("fairway: {error}")];
    let (mut wrong, mut applied) = (Vec::new(), Vec::new());
    for (file, text) in texts {
        match lab.ask(&Request::Apply { file: file.clone(), text }) {
            Ok(reply) => {
                report(&reply.text);
                applied.push(file);
            }
            Err(error) => wrong.extend(told(&error)),
        }
    }
    wrong.extend(lab.problems(&applied).unwrap_or_else(|error| told(&error)));
    wrong
}

fn label_request(object: &str, label: &str) -> anyhow::Result<Request> {
    let (namespace, pod) = match object.split_once('/') {
        Some((namespace, pod)) => (namespace.to_owned(), Some(pod.to_owned())),
        None => (object.to_owned(), None),
    };
    let (key, value) = match (label.split_once('='), label.strip_suffix('-')) {
        (Some((key, value)), _) => (key.to_owned(), Some(value.to_owned())),
        (None, Some(key)) => (key.to_owned(), None),
        (None, None) => anyhow::bail!("`{label}` is neither key=value nor key-"),
    };
    Ok(Request::Label { namespace, pod, key, value })
}

fn fault_request(fault: Fault) -> protocol::Fault {
    match fault {
        Fault::Freeze { program } => protocol::Fault::Freeze { program },
        Fault::Thaw { program } => protocol::Fault::Thaw { program },
        Fault::Kill { program, restart } => protocol::Fault::Kill { program, restart },
        Fault::Start { program } => protocol::Fault::Start { program },
        Fault::Partition { node } => protocol::Fault::Partition { node },
        Fault::Heal { node } => protocol::Fault::Heal { node },
        Fault::Delay { node, milliseconds } => protocol::Fault::Delay { node, milliseconds },
        Fault::Block { pod, port } => protocol::Fault::Block { pod, port },
        Fault::Unblock { pod } => protocol::Fault::Unblock { pod },
        Fault::Unready { pod } => protocol::Fault::Unready { pod },
        Fault::Ready { pod } => protocol::Fault::Ready { pod },
        Fault::Upgrade { node, binary } => protocol::Fault::Upgrade { node, binary },
    }
}

fn print_pods(status: &Status, output: Output) -> anyhow::Result<()> {
    if output != Output::Text {
        crate::output::say!("{}", output.render(&status.pods, String::new)?);
        return Ok(());
    }
    if status.pods.is_empty() {
        crate::output::say!("no pods; `fairway lab apply -f FILE` adds some");
        return Ok(());
    }
    let rows = status.pods.iter().map(|p| {
        let state =
            p.problem.as_deref().unwrap_or(if p.enrolment.is_empty() { "not in the mesh" } else { &p.enrolment });
        vec![
            format!("{}/{}", p.namespace, p.name),
            p.node.clone(),
            p.addresses.join(" "),
            p.service_account.clone(),
            state.to_owned(),
        ]
    });
    crate::output::say!("{}", output::table(&["POD", "NODE", "ADDRESSES", "SERVICE ACCOUNT", "MESH"], rows));
    Ok(())
}

fn print_status(status: &Status, output: Output) -> anyhow::Result<()> {
    if output != Output::Text {
        crate::output::say!("{}", output.render(status, String::new)?);
        return Ok(());
    }
    let programs = status.programs.iter().map(|p| {
        let process = if p.process == 0 { "stopped".to_owned() } else { p.process.to_string() };
        vec![p.name.clone(), process, p.restarts.to_string()]
    });
    crate::output::say!("{}\n", output::table(&["PROGRAM", "PROCESS", "RESTARTS"], programs));
    let services = status.services.iter().map(|(name, vips)| vec![name.clone(), vips.join(" ")]);
    crate::output::say!("{}\n", output::table(&["SERVICE", "ADDRESSES"], services));
    let urls = status.urls.iter().map(|(name, url)| vec![name.clone(), url.clone()]);
    crate::output::say!("{}\n", output::table(&["PAGE", "URL"], urls));
    print_pods(status, Output::Text)
}

fn traffic(
    lab: &Running,
    source: &str,
    target: &str,
    connections: usize,
    seconds: f64,
    new_connections: bool,
) -> anyhow::Result<ExitCode> {
    let report = crate::demo::load(lab, source, target, connections, seconds, new_connections)?;
    crate::output::say!(
        "{:.0} requests/s, {} errors; p50 {}, p99 {}",
        report.per_second(),
        report.errors,
        output::microseconds(report.p50_us),
        output::microseconds(report.p99_us)
    );
    if let Some(error) = &report.first_error {
        crate::output::say!("first error: {error}");
    }
    Ok(if report.errors == 0 && report.requests > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
