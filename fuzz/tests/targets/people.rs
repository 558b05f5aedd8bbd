//! What people write.

use std::{ffi::OsString, time::Duration};

use fuzz::target;
use mesh_runtime::{admin::parse_query, env::parse_duration};

use crate::{node::variables, text};

target!(
    /// Manifests as the control plane reads them, through `fairwayd check`.
    manifests,
    runs = 300,
    |bytes: &[u8]| {
        let folder = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(folder.path().join("seed.yaml"), bytes).expect("the file is written");
        let arguments = ["check".into(), "--manifests".into(), folder.path().as_os_str().to_owned()];
        control_plane::main(Vec::<OsString>::from(arguments));
    }
);

target!(manifests_of_the_agent, |bytes: &[u8]| {
    if let Err(problem) = cni_plugin::agent::source::parse_manifest(&text(bytes)) {
        assert!(problem.starts_with("document at line "), "{problem}");
    }
});

target!(
    /// What the lab leaves of a file keeps its lines, and holds nothing more for the lab.
    manifests_of_the_lab,
    |bytes: &[u8]| {
        let text = text(bytes);
        match lab::manifest::split("seed.yaml", &text) {
            Ok(split) => {
                assert_eq!(split.rest.lines().count(), text.lines().count());
                let again = lab::manifest::split("seed.yaml", &split.rest).expect("what was left can be read");
                assert!(again.namespaces.is_empty() && again.pods.is_empty() && again.services.is_empty());
                assert_eq!(again.rest, split.rest);
            }
            Err(error) => assert!((1..=text.lines().count().max(1)).contains(&error.line), "{error}"),
        }
    }
);

target!(
    /// Any key and value survive percent-encoding.
    query,
    |bytes: &[u8]| {
        let text = text(bytes);
        parse_query(&text);
        let (key, value) = text.split_at(text.floor_char_boundary(text.len() / 2));
        let read = parse_query(&format!("{}={}", encoded(key), encoded(value)));
        let expected = [(key.to_owned(), value.to_owned())];
        assert_eq!(read.into_iter().collect::<Vec<_>>(), expected);
    }
);

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

target!(
    /// What scrapers accept: only what they named is chosen.
    scrape,
    |bytes: &[u8]| {
        let Ok(value) = http::HeaderValue::from_bytes(bytes) else { return };
        let headers = [(http::header::ACCEPT, value.clone()), (http::header::ACCEPT_ENCODING, value)].into_iter().collect();
        let (_, coding) = mesh_runtime::admin::scrape::negotiate(&headers);
        let named = |coding: &str| String::from_utf8_lossy(bytes).to_ascii_lowercase().contains(coding);
        assert!(coding.is_none_or(named), "{coding:?}");
    }
);

target!(
    /// What `/logging` understood once, it understands again, and alike.
    log_level,
    |bytes: &[u8]| {
        if let Ok(spec) = ztunnel::admin::logging::spec(&text(bytes)) {
            assert_eq!(ztunnel::admin::logging::spec(&spec), Ok(spec));
        }
    }
);

target!(duration, |bytes: &[u8]| {
    if let Some(duration) = parse_duration(&text(bytes)) {
        let seconds = u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        assert_eq!(parse_duration(&format!("{seconds}s")), Some(Duration::from_secs(seconds.into())));
    }
});

target!(
    /// Every variable of ztunnel and of the agent, a line each: a configuration or a list of problems.
    environment,
    |bytes: &[u8]| {
        let vars = variables(bytes);
        if let Err(problems) = ztunnel::config::Config::from_env(&vars) {
            assert!(!problems.0.is_empty());
        }
        if let Err(problems) = cni_plugin::agent::Config::from_env(&vars) {
            assert!(!problems.0.is_empty());
        }
    }
);

target!(
    /// The facts an operator writes beside a proxy.
    static_config,
    runs = 300,
    |bytes: &[u8]| {
        if let Err(problem) = ztunnel::static_config::parse(&text(bytes)) {
            assert!(!problem.is_empty());
        }
    }
);
