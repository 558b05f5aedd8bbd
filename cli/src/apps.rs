//! `fairway app …`: the lab's little programs.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use lab::apps::{hold, http, load, names, relay, steady, stream};

use crate::args::{App, TransferMode};

pub(crate) fn run(app: App) -> anyhow::Result<ExitCode> {
    match app {
        App::Http { listen, name, drain } => http::serve(address(&listen)?, &name, Duration::from_secs(drain))?,
        App::Echo { listen } => steady::echo(address(&listen)?)?,
        App::Stream { listen } => stream::serve(address(&listen)?)?,
        App::Greet { listen } => stream::greet(address(&listen)?)?,
        App::Steady { target, interval_ms, control } => run_steady(&target, interval_ms, &control)?,
        App::Reconnect { control } => {
            TcpStream::connect(&control)?.write_all(b"!")?;
        }
        App::Get { url, timeout } => {
            let answer = http::get(&url, Duration::from_secs(timeout)).with_context(|| format!("GET {url}"))?;
            crate::output::say!("{}", answer.body.trim_end());
            return Ok(if answer.status == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        App::Transfer { mode, target, bytes, connections } => {
            let outcome = match mode {
                TransferMode::Bulk => stream::bulk(&target, connections, bytes),
                TransferMode::CloseFirst => stream::close_first(&target, bytes),
                TransferMode::Download => stream::download(&target, bytes),
                TransferMode::Many => stream::many(&target, connections, bytes),
                TransferMode::Greeting => stream::expect_greeting(&target),
                TransferMode::SendReset => stream::send_reset(&target),
                TransferMode::Slow => stream::slow_download(&target, bytes, Duration::from_secs(3)),
                TransferMode::Reset => stream::expect_reset(&target),
                TransferMode::Upload => stream::upload(&target, bytes),
            };
            crate::output::say!("{}", serde_json::to_string(&outcome)?);
            return Ok(if outcome.error.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        App::Nameserver { listen } => names::serve(address(&listen)?)?,
        App::Ask { server, name, tcp, timeout } => {
            let found = names::ask(address(&server)?, &name, tcp, Duration::from_secs(timeout));
            let found: Vec<String> =
                found.with_context(|| format!("ask {server}"))?.iter().map(ToString::to_string).collect();
            crate::output::say!("{}", found.join(" "));
        }
        App::Relay { listen, instead } => relay::serve(address(&listen)?, instead, |told| {
            crate::output::say!("{}", serde_json::to_string(told).unwrap_or_default());
        })?,
        App::Hold { listen } => hold::serve(address(&listen)?)?,
        App::Idlers { target, connections, seconds } => {
            hold::hold(&target, connections, Duration::try_from_secs_f64(seconds)?, |held| {
                crate::output::say!("{}", serde_json::to_string(held).unwrap_or_default());
            })?;
        }
        App::Load { target, path, connections, seconds, new_connections } => {
            let report = load::run(&load::Load { target, path, connections, seconds, new_connections });
            crate::output::say!("{}", serde_json::to_string(&report)?);
        }
        App::Idle => loop {
            std::thread::park();
        },
    }
    Ok(ExitCode::SUCCESS)
}

fn address(text: &str) -> anyhow::Result<SocketAddr> {
    text.parse().with_context(|| format!("`{text}` is not an address such as [::]:8080"))
}

fn run_steady(target: &str, interval_ms: u64, control: &str) -> anyhow::Result<()> {
    let reconnect = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind(control)?;
    let flag = reconnect.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            flag.store(stream.read(&mut [0]).is_ok_and(|n| n == 1), Ordering::Relaxed);
        }
    });
    steady::run(target, Duration::from_millis(interval_ms), &reconnect, |progress| {
        if let Ok(line) = serde_json::to_string(progress) {
            crate::output::say!("{line}");
        }
    })
}
