//! Bytes between the programs of one node.

use std::{collections::HashMap, time::SystemTime};

use cni_plugin::{
    agent::zds::{ZdsError, parse_hello, parse_response},
    decision::Decisions,
    request::{parse_answer, parse_request},
    spec::{Command, add_result, check_version, parse_config, parse_env, previous_ips, version_result},
};
use fuzz::target;
use ztunnel::{
    dns::message::{self, Incoming, MAX_MESSAGE, Reply},
    inpod::protocol::{self, Session, Step},
};

use crate::text;

target!(
    /// Packets separated by a byte 0xff (which starts none), each with as many descriptors as its length leaves modulo 3.
    zds_session,
    |bytes: &[u8]| {
        let mut session = Session::default();
        for packet in bytes.split(|byte| *byte == 0xff) {
            let was_complete = session.is_complete();
            let step = protocol::parse(packet, vec![(); packet.len() % 3]).and_then(|message| session.step(message));
            let reaped = matches!(step, Ok(Step::Reap { .. }));
            assert!(!(reaped && was_complete), "a session reaps once");
            if step.is_err_and(|error| error.ends_session()) {
                return;
            }
        }
    }
);

target!(
    /// The answer that one side writes is what the other reads, and fits its buffer.
    zds_answer,
    |bytes: &[u8]| {
        drop((parse_hello(bytes), parse_response(bytes)));
        assert!(parse_hello(&protocol::hello()).is_ok());
        let error = text(bytes);
        let packet = protocol::ack(Some(&error));
        assert!(packet.len() <= 1024);
        match parse_response(&packet) {
            Ok(()) => assert!(error.is_empty()),
            Err(ZdsError::Refused(read)) => assert!(!read.is_empty() && error.starts_with(&read)),
            Err(other) => panic!("{other}"),
        }
    }
);

target!(cni_config, |bytes: &[u8]| {
    let version = version_result(bytes);
    serde_json::from_str::<serde_json::Value>(&version).expect("an answer in JSON");
    let conf = match parse_config(bytes) {
        Ok(conf) => conf,
        Err(error) => {
            serde_json::from_str::<serde_json::Value>(&error.to_json("1.1.0")).expect("an error in JSON");
            return;
        }
    };
    assert!(check_version(Command::Add, &conf).is_ok(), "every version has ADD");
    drop(previous_ips(&conf));
    let passed_on = add_result(&conf);
    assert!(conf.prev_result.is_none_or(|previous| previous.get() == passed_on), "the result so far is not ours");
});

target!(
    /// A line per variable.
    cni_environment,
    |bytes: &[u8]| {
        let Ok(call) = parse_env(&variables(bytes)) else { return };
        if matches!(call.command, Command::Add | Command::Check) {
            assert!(!call.container_id.is_empty() && !call.netns.as_os_str().is_empty());
        }
    }
);

pub(crate) fn variables(bytes: &[u8]) -> HashMap<String, String> {
    text(bytes).lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

target!(plugin_request, |bytes: &[u8]| {
    if let Ok(request) = parse_request(bytes) {
        request.addresses();
        let written = serde_json::to_vec(&request).expect("JSON");
        assert_eq!(parse_request(&written), Ok(request));
    }
});

target!(plugin_answer, |bytes: &[u8]| drop(parse_answer(bytes)));

target!(
    /// The file through which the agent tells the plugin, read from where it lies.
    decision_file,
    runs = 300,
    |bytes: &[u8]| {
        let folder = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(Decisions::path(folder.path()), bytes).expect("the file is written");
        let now = SystemTime::UNIX_EPOCH;
        if let Some(mut decisions) = Decisions::read_fresh(folder.path(), now) {
            decisions.write(folder.path(), now).expect("the file is written");
            assert_eq!(Decisions::read_fresh(folder.path(), now), Some(decisions));
        }
    }
);

target!(
    /// Whatever an application sends, the answer is one of its own query, within what it takes.
    dns_query,
    |bytes: &[u8]| {
        let addresses: Vec<_> = (0..=255).map(|i| [10, 0, 0, i].into()).collect();
        match message::read(bytes) {
            Incoming::Stub => assert!(bytes.len() < 12 || bytes[2] & 0x80 != 0),
            Incoming::Refused(code) => assert!(message::answers(&message::refusal(bytes, code), [bytes[0], bytes[1]])),
            Incoming::Other(_) => assert!(!message::answers(bytes, [bytes[0], bytes[1]])),
            Incoming::Addresses { name, .. } => {
                assert!(name.len() <= 255 && !name.bytes().any(|byte| byte.is_ascii_uppercase()));
                for (alias_of, datagram) in [(None, true), (Some(&*name), true), (None, false)] {
                    let reply = Reply { alias_of, addresses: &addresses, datagram };
                    if let Some(answer) = message::answer(bytes, &reply) {
                        assert!(message::answers(&answer, [bytes[0], bytes[1]]) && answer.len() <= MAX_MESSAGE);
                    }
                }
            }
        }
    }
);

target!(
    /// What a disk gives back of the saved discovery state.
    saved_state,
    |bytes: &[u8]| {
        ztunnel::discovery::decode_saved(bytes);
    }
);
