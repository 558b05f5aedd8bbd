//! The admin port: what the process knows, why it decides as it does, how loudly it logs, and when it leaves.

use std::{
    future::{Ready, ready},
    sync::Arc,
};

use http::{Method, StatusCode};
use mesh_runtime::admin::{AdminServer, Request, Response, html, json, text};
use tokio_util::sync::CancellationToken;

use crate::{inpod::manager::PodTable, pods::Shared};

pub mod config_dump;
pub mod logging;
mod profile;
pub mod why;

/// Method, path with its parameters, and what it is for.
const PAGES: [(&str, &str, &str); 8] = [
    (
        "GET",
        "/config_dump[?part=certificates]",
        "what this proxy knows: workloads, services, policies, certificates, connections, configuration",
    ),
    (
        "GET",
        "/debug/why/outbound?namespace=&pod=&destination=IP:PORT[&probe=true]",
        "what would become of a pod's connection",
    ),
    (
        "GET",
        "/debug/why/inbound?namespace=&pod=&source_ip=&source_identity=&destination=IP:PORT[&probe=true]",
        "whether a peer may reach a pod",
    ),
    ("GET", "/debug/pprof/profile?seconds=10&frequency=100", "a CPU profile for pprof"),
    ("GET", "/debug/pprof/heap", "a heap profile; this build has none, and says what to use"),
    ("GET", "/debug/pprof/heap/profiling", "the state of heap profiling"),
    ("POST", "/logging?level=info,access=debug&reset", "shows or changes what is logged"),
    ("POST", "/quitquitquit", "starts a graceful shutdown"),
];

/// What the handlers answer from.
#[derive(Clone, Debug)]
pub struct Context {
    pub shared: Arc<Shared>,
    pub pods: PodTable,
    /// Cancelled by `POST /quitquitquit`.
    pub quit: CancellationToken,
}

/// The routes of the admin port.
pub fn server(context: Context) -> AdminServer {
    let route = |handler: fn(&Context, &Request) -> Response| {
        let context = context.clone();
        move |request: Request| -> Ready<Response> { ready(handler(&context, &request)) }
    };
    let (outbound, inbound) = (context.clone(), context.clone());
    AdminServer::new()
        .route("/", route(|_, _| html(StatusCode::OK, index())))
        .route("/config_dump", route(config_dump::respond))
        .route("/debug/why/outbound", move |request| why::outbound(outbound.clone(), request))
        .route("/debug/why/inbound", move |request| why::inbound(inbound.clone(), request))
        .route("/debug/pprof/profile", profile::cpu)
        .route("/debug/pprof/heap", route(|_, _| profile::heap()))
        .route("/debug/pprof/heap/profiling", route(|_, _| profile::heap()))
        .route("/logging", route(|_, request| logging::respond(request)))
        .route("/quitquitquit", route(quit))
}

fn index() -> String {
    let row = |(method, page, what): &(&str, &str, &str)| {
        let (path, page) = (page.split(['?', '[']).next().unwrap_or(page), page.replace('&', "&amp;"));
        let page = if *method == "GET" { format!("<a href=\"{path}\">{page}</a>") } else { page };
        format!("<tr><td>{method}</td><td>{page}</td><td>{what}</td></tr>\n")
    };
    let rows: String = PAGES.iter().map(row).collect();
    format!(
        "<!DOCTYPE html>\n<html><head><title>ztunnel</title></head><body>\n<h1>ztunnel</h1>\n<table>\n{rows}</table>\n</body></html>\n"
    )
}

fn quit(context: &Context, request: &Request) -> Response {
    if request.method != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n");
    }
    context.quit.cancel();
    text(StatusCode::OK, "shutdown now\n")
}

/// A JSON answer of anything that serialises.
fn answer(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => json(StatusCode::OK, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode the answer: {error}\n")),
    }
}
