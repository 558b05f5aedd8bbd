//! One call of the CNI plugin: who is the pod, does it belong to the mesh, and if so, have the agent capture it.
//!
//! Blocking code, nothing but the result on standard output, and for a pod outside the mesh as little as possible.

use std::{
    io::{self, Read, Write},
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use mesh_net::NetNs;
use mesh_runtime::{
    env::{ProcessEnv, Vars},
    telemetry::error_chain,
};

use crate::{
    decision::Decisions,
    eligibility::decide,
    lookup::lookup,
    request::{AddAnswer, AddRequest, post, socket_path},
    rules::{RulesError, verify_installed},
    spec::{
        CallEnv, CniError, Command, MAX_CONFIG, NetConf, PodArgs, VERSIONS, add_result, check_version, parse_config,
        parse_env, previous_ips, version_result,
    },
};

/// How long the agent may take; the kubelet tries again.
const AGENT_LIMIT: Duration = Duration::from_secs(5);

/// The plugin as the container runtime executes it.
pub fn plugin_main() -> ExitCode {
    let mut stdin = Vec::new();
    // One byte more than allowed, so that too much is noticed; an unreadable stdin is an empty, thus malformed one.
    drop(io::stdin().take(MAX_CONFIG as u64 + 1).read_to_end(&mut stdin));
    let outcome = run(&ProcessEnv, &stdin, SystemTime::now());
    let written = io::stdout().write_all(outcome.stdout.as_bytes());
    if outcome.failed || written.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What the process prints, and whether it exits with 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: String,
    pub failed: bool,
}

/// One call; panics have become CNI errors.
pub fn run(vars: &dyn Vars, stdin: &[u8], now: SystemTime) -> Outcome {
    let called = panic::catch_unwind(AssertUnwindSafe(|| call(vars, stdin, now)));
    let result = called.unwrap_or_else(|_| {
        Err(CniError::new(CniError::PANIC, "the plugin failed in an unforeseen way", "see its standard error"))
    });
    // DEL never fails: the pod would stay in Terminating for ever, and there is nothing of ours left to delete.
    let is_delete = vars.var("CNI_COMMAND").is_some_and(|c| c == "DEL");
    match result {
        Ok(stdout) => Outcome { stdout, failed: false },
        Err(_) if is_delete => Outcome { stdout: String::new(), failed: false },
        Err(error) => Outcome { stdout: error.to_json(version_of(stdin)), failed: true },
    }
}

/// Errors too carry the version of the configuration, where it is one we know.
fn version_of(stdin: &[u8]) -> &'static str {
    let asked = parse_config(stdin).map(|c| c.cni_version).unwrap_or_default();
    VERSIONS.iter().find(|v| **v == asked).unwrap_or(&VERSIONS[3])
}

fn call(vars: &dyn Vars, stdin: &[u8], now: SystemTime) -> Result<String, CniError> {
    let env = parse_env(vars)?;
    if env.command == Command::Version {
        return Ok(version_result(stdin));
    }
    let conf = parse_config(stdin)?;
    check_version(env.command, &conf)?;
    match env.command {
        Command::Add => add(&env, &conf, now),
        Command::Check => check(&env, &conf, now),
        // The rules go with the pod's namespace, and STATUS must not turn the node un-ready when the agent restarts.
        Command::Del | Command::Gc | Command::Status | Command::Version => Ok(String::new()),
    }
}

/// What is known about a pod without asking anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Enrolled,
    NotEnrolled,
    Undecided,
}

fn known(pod: &PodArgs, conf: &NetConf, now: SystemTime) -> Known {
    if is_agent(pod, conf) || conf.exclude_namespaces.contains(&pod.namespace) {
        return Known::NotEnrolled;
    }
    let decisions = Decisions::read_fresh(&conf.cni_agent_run_dir, now);
    match decisions.and_then(|d| d.of(&pod.namespace, &pod.name, pod.uid.as_deref())) {
        Some(true) => Known::Enrolled,
        Some(false) => Known::NotEnrolled,
        None => Known::Undecided,
    }
}

/// The agent's own pod must start without an agent.
fn is_agent(pod: &PodArgs, conf: &NetConf) -> bool {
    let ours = ["fairway-node-", "istio-cni-node-"].iter().any(|prefix| pod.name.starts_with(prefix));
    ours && !conf.pod_namespace.is_empty() && pod.namespace == conf.pod_namespace
}

fn add(env: &CallEnv, conf: &NetConf, now: SystemTime) -> Result<String, CniError> {
    if let Some(pod) = &env.pod {
        let known = known(pod, conf, now);
        if known != Known::NotEnrolled {
            ask_agent(env, pod, conf, known == Known::Undecided)?;
        }
    }
    Ok(add_result(conf))
}

/// Returns once the pod is captured, or known not to be in the mesh.
fn ask_agent(env: &CallEnv, pod: &PodArgs, conf: &NetConf, undecided: bool) -> Result<(), CniError> {
    let ips = previous_ips(conf)?;
    let request = AddRequest {
        netns: env.netns.to_string_lossy().into_owned(),
        pod_name: pod.name.clone(),
        pod_namespace: pod.namespace.clone(),
        ips: Some(ips.iter().map(Into::into).collect()),
        pod_uid: pod.uid.clone(),
        undecided,
    };
    let body = serde_json::to_vec(&request).map_err(|e| CniError::new(CniError::IO, e.to_string(), ""))?;
    let socket = socket_path(&conf.cni_agent_run_dir);
    let who = format!("{}/{}", pod.namespace, pod.name);
    let (status, answer) = match post(&socket, "/cmdadd", body, AGENT_LIMIT) {
        Ok(answered) => answered,
        Err(error) => {
            let membership = if undecided { ask_api(pod, conf) } else { Membership::Inside };
            let doubt = match membership {
                Membership::Outside => return Ok(()),
                Membership::Inside => String::new(),
                Membership::Unknown(why) => format!("whether it belongs to the mesh is not known ({why}), so "),
            };
            return Err(CniError::new(
                CniError::TRY_AGAIN,
                format!("cannot capture pod {who}: the node agent does not answer on {}: {error}", socket.display()),
                format!("{doubt}it does not start uncaptured; it will once the node agent of this node runs"),
            ));
        }
    };
    if status != 200 {
        let message = format!("the node agent refuses pod {who}: {answer}");
        return Err(CniError::new(CniError::REFUSED, message, format!("HTTP status {status}")));
    }
    if ips.is_empty() && !undecided_and_out(undecided, &answer) {
        let details = "prevResult.ips is empty: this plugin must be chained after the one that gives addresses";
        return Err(CniError::new(CniError::INVALID_CONFIG, format!("pod {who} has no address"), details));
    }
    Ok(())
}

/// What the API server says of a pod while the agent is away.
enum Membership {
    Inside,
    Outside,
    Unknown(String),
}

fn ask_api(pod: &PodArgs, conf: &NetConf) -> Membership {
    match lookup(&conf.cni_agent_run_dir, pod) {
        Ok((pod, labels)) => match decide(&pod, &labels, &conf.exclude_namespaces) {
            Ok(()) => Membership::Inside,
            Err(_) => Membership::Outside,
        },
        Err(error) => Membership::Unknown(error_chain(&error)),
    }
}

fn undecided_and_out(undecided: bool, answer: &str) -> bool {
    undecided && serde_json::from_str::<AddAnswer>(answer).is_ok_and(|answer| !answer.enrolled)
}

/// Reads the rules in the pod's namespace; needs no agent.
fn check(env: &CallEnv, conf: &NetConf, now: SystemTime) -> Result<String, CniError> {
    let Some(pod) = &env.pod else { return Ok(String::new()) };
    let known = known(pod, conf, now);
    if known == Known::NotEnrolled {
        return Ok(String::new());
    }
    let failed = |why: String| {
        let message = format!("pod {}/{} is not captured as it should be: {why}", pod.namespace, pod.name);
        CniError::new(CniError::CHECK_FAILED, message, "the node agent repairs it within a minute, or restart the pod")
    };
    let ns = NetNs::open(&env.netns).map_err(|e| {
        let details = "CNI_NETNS must be the path of the pod's network namespace";
        CniError::new(CniError::INVALID_ENVIRONMENT, format!("{}: {e}", env.netns.display()), details)
    })?;
    match verify_installed(&ns) {
        Ok(true) => Ok(String::new()),
        Ok(false) if known == Known::Undecided => Ok(String::new()),
        Ok(false) => Err(failed("it has no rules".into())),
        Err(RulesError::Mismatch(why)) => Err(failed(why)),
        Err(error) => {
            Err(CniError::new(CniError::IO, error.to_string(), "the plugin needs CAP_NET_ADMIN and CAP_SYS_ADMIN"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        net::TcpListener,
        os::unix::net::UnixListener,
        path::Path,
        thread::{self, JoinHandle},
    };

    use super::*;
    use crate::{decision::Listed, request::parse_request};

    const PREVIOUS: &str = r#"{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.7/24"}]}"#;

    fn env(command: &str, pod: &str) -> HashMap<String, String> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME={pod};K8S_POD_UID=u1");
        let pairs = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/proc/self/ns/net"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", args.as_str()),
        ];
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn conf(run_dir: &Path, extra: &str) -> Vec<u8> {
        let run_dir = run_dir.display();
        format!(
            r#"{{"cniVersion":"1.0.0","name":"n","type":"fairway-cni","cni_agent_run_dir":"{run_dir}","prevResult":{PREVIOUS}{extra}}}"#
        )
        .into_bytes()
    }

    fn agent(run_dir: &Path, answer: &'static str) -> JoinHandle<AddRequest> {
        let listener = UnixListener::bind(socket_path(run_dir)).expect("bind");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut request = vec![0; 4096];
            let mut length = 0;
            loop {
                length += stream.read(&mut request[length..]).expect("read");
                let text = String::from_utf8_lossy(&request[..length]).into_owned();
                if let Some((_, body)) = text.split_once("\r\n\r\n")
                    && let Ok(parsed) = parse_request(body.as_bytes())
                {
                    stream.write_all(answer.as_bytes()).expect("write");
                    return parsed;
                }
            }
        })
    }

    fn list(run_dir: &Path, enrolled: bool) {
        let mut decisions = Decisions::default();
        decisions.pods.insert("demo/app".into(), Listed { uid: "u1".into(), enrolled });
        decisions.write(run_dir, SystemTime::now()).expect("write");
    }

    fn run_now(vars: &HashMap<String, String>, stdin: &[u8]) -> Outcome {
        run(vars, stdin, SystemTime::now())
    }

    #[test]
    fn a_pod_known_to_be_outside_the_mesh_passes_without_an_agent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        list(dir.path(), false);
        let passed = Outcome { stdout: PREVIOUS.into(), failed: false };
        assert_eq!(run_now(&env("ADD", "app"), &conf(dir.path(), "")), passed);
        let excluded = conf(dir.path(), r#","exclude_namespaces":["demo"]"#);
        assert_eq!(run_now(&env("ADD", "unheard-of"), &excluded), passed);
        let own = conf(dir.path(), r#","pod_namespace":"demo""#);
        assert_eq!(run_now(&env("ADD", "fairway-node-x"), &own), passed);
        let mut no_pod = env("ADD", "app");
        no_pod.insert("CNI_ARGS".into(), String::new());
        assert_eq!(run_now(&no_pod, &conf(dir.path(), "")), passed);
    }

    #[test]
    fn an_enrolled_or_undecided_pod_does_not_start_without_an_agent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for decided in [false, true] {
            if decided {
                list(dir.path(), true);
            }
            let outcome = run_now(&env("ADD", "app"), &conf(dir.path(), ""));
            assert!(outcome.failed);
            let error: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON only");
            assert_eq!(error["code"], CniError::TRY_AGAIN);
            assert!(error["msg"].as_str().is_some_and(|m| m.contains("demo/app")), "{error}");
        }
    }

    /// An API server that knows the pod and its namespace.
    fn api(run_dir: &Path, pod_labels: &str, namespace_labels: &str) -> JoinHandle<()> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let server = format!("http://{}", listener.local_addr().expect("address"));
        let file = serde_json::json!({"clusters": [{"cluster": {"server": server}}]});
        std::fs::write(crate::lookup::Kubeconfig::path(run_dir), file.to_string()).expect("write");
        let pod = format!(
            r#"{{"metadata":{{"name":"app","namespace":"demo","uid":"u1","labels":{{{pod_labels}}}}},"spec":{{"nodeName":"n"}}}}"#
        );
        let namespace = format!(r#"{{"metadata":{{"name":"demo","labels":{{{namespace_labels}}}}}}}"#);
        thread::spawn(move || {
            for body in [pod, namespace] {
                let (mut stream, _) = listener.accept().expect("accept");
                let mut asked = [0; 4096];
                assert!(stream.read(&mut asked).expect("read") > 0);
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).expect("write");
            }
        })
    }

    #[test]
    fn while_the_agent_is_away_the_api_server_says_who_may_start() {
        const AMBIENT: &str = r#""istio.io/dataplane-mode":"ambient""#;
        const NONE: &str = r#""istio.io/dataplane-mode":"none""#;
        for (pod, namespace, starts) in
            [("", "", true), ("", AMBIENT, false), (AMBIENT, "", false), (AMBIENT, NONE, false), (NONE, AMBIENT, true)]
        {
            let dir = tempfile::tempdir().expect("temporary directory");
            let api = api(dir.path(), pod, namespace);
            let outcome = run_now(&env("ADD", "app"), &conf(dir.path(), ""));
            assert_eq!(outcome.failed, !starts, "{pod} {namespace}: {}", outcome.stdout);
            api.join().expect("both were asked for");
        }
    }

    #[test]
    fn the_agent_is_told_where_the_pod_is_and_its_answer_counts() {
        for (answer, passes) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"enrolled\":true}", true),
            ("HTTP/1.1 500 Internal Server Error\r\n\r\nno ztunnel connected", false),
            ("gibberish", false),
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let agent = agent(dir.path(), answer);
            let outcome = run_now(&env("ADD", "app"), &conf(dir.path(), ""));
            assert_eq!(outcome.failed, !passes, "{}", outcome.stdout);
            let request = agent.join().expect("agent");
            assert_eq!((request.netns.as_str(), request.pod_uid.as_deref()), ("/proc/self/ns/net", Some("u1")));
            assert_eq!(request.addresses(), ["10.0.0.7".parse::<std::net::IpAddr>().expect("ip")]);
            assert!(request.undecided);
        }
    }

    #[test]
    fn delete_status_and_gc_never_fail_and_print_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let silent = Outcome { stdout: String::new(), failed: false };
        let newest = String::from_utf8(conf(dir.path(), "")).expect("text").replace("1.0.0", "1.1.0");
        for command in ["DEL", "STATUS", "GC"] {
            assert_eq!(run_now(&env(command, "app"), newest.as_bytes()), silent);
        }
        assert_eq!(run_now(&env("DEL", "app"), b"not json"), silent);
        let bare = HashMap::from([("CNI_COMMAND".to_owned(), "DEL".to_owned())]);
        assert_eq!(run_now(&bare, b""), silent);
    }

    #[test]
    fn errors_are_json_in_the_callers_version() {
        let outcome = run_now(&env("FROB", "app"), br#"{"cniVersion":"0.4.0"}"#);
        let error: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        assert_eq!(
            (error["cniVersion"].as_str(), error["code"].as_u64(), outcome.failed),
            (Some("0.4.0"), Some(4), true)
        );
        let outcome = run_now(&env("ADD", "app"), b"");
        let error: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        assert_eq!(error["code"].as_u64(), Some(6));
    }

    #[test]
    fn a_panic_becomes_a_cni_error() {
        struct Broken;
        impl Vars for Broken {
            fn var(&self, name: &str) -> Option<String> {
                if name == "CNI_COMMAND" { Some("ADD".into()) } else { panic!("on purpose") }
            }

            fn with_prefix(&self, _: &str) -> std::collections::BTreeMap<String, String> {
                std::collections::BTreeMap::new()
            }
        }
        let outcome = run(&Broken, b"{}", SystemTime::now());
        assert!(outcome.failed && outcome.stdout.contains(r#""code":102"#), "{}", outcome.stdout);
    }
}
