//! How the program leaves, seen from outside: signals, exit status, last words.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, TcpStream},
    process::{Child, ChildStderr, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const READINESS: u16 = 15021;
const SOCKS: u16 = 15080;

/// A dedicated proxy on an address of its own, without a control plane.
struct Program {
    child: Child,
    ip: IpAddr,
    log: BufReader<ChildStderr>,
}

impl Program {
    fn start(grace: &str) -> Self {
        let random = || rand::random_range(1..255);
        let ip: IpAddr = Ipv4Addr::new(127, random(), random(), random()).into();
        let mut child = Command::new(env!("CARGO_BIN_EXE_ztunnel"))
            .env_clear()
            .envs([
                ("PROXY_MODE", "dedicated"),
                ("PROXY_WORKLOAD_INFO", "demo/test/test"),
                ("XDS_ADDRESS", ""),
                ("FAIRWAY_LOCAL_ADDRESS", &*ip.to_string()),
                ("UNSTABLE_ENABLE_SOCKS5", "true"),
                ("TERMINATION_GRACE_PERIOD_SECONDS", grace),
            ])
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        Self { child, ip, log }
    }

    /// Reads the log up to a line that holds `text`.
    fn said(&mut self, text: &str) {
        let mut line = String::new();
        while self.log.read_line(&mut line).expect("log") > 0 {
            if line.contains(text) {
                return;
            }
            line.clear();
        }
        panic!("the log ended without `{text}`");
    }

    fn ready(&mut self) {
        self.said("readiness port");
        // Bound before it is said, and served a moment later.
        let mut answer = String::new();
        while !answer.starts_with("HTTP/1.1 200") {
            answer.clear();
            let mut stream = TcpStream::connect((self.ip, READINESS)).expect("bound");
            stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("write");
            stream.read_to_string(&mut answer).expect("read");
        }
    }

    /// A client that has begun and says no more: what a drain waits for.
    fn hang_on(&self) -> TcpStream {
        let mut stream = TcpStream::connect((self.ip, SOCKS)).expect("bound");
        stream.write_all(&[5, 1, 0]).expect("greeting");
        stream.read_exact(&mut [0; 2]).expect("the proxy's choice");
        stream
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, signal).expect("signal");
    }

    fn leaves_well(&mut self) {
        assert!(self.child.wait().expect("wait").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Gone already, if the test went well.
        self.child.kill().unwrap_or_default();
        self.child.wait().expect("wait");
    }
}

#[test]
fn a_signal_drains_and_an_idle_proxy_is_gone_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut program = Program::start("3600");
        program.ready();
        program.signal(signal);
        program.said("draining");
        program.said("drained");
        program.leaves_well();
    }
}

#[test]
fn a_second_sigint_does_not_wait_for_the_drain() {
    let mut program = Program::start("3600");
    program.ready();
    let _held = program.hang_on();
    program.signal(Signal::SIGINT);
    program.said("draining");
    program.signal(Signal::SIGINT);
    program.said("told twice: leaving at once");
    program.leaves_well();
}

#[test]
fn what_is_left_at_the_deadline_is_cut_and_the_program_leaves_well() {
    let mut program = Program::start("1");
    program.ready();
    let _held = program.hang_on();
    program.signal(Signal::SIGTERM);
    program.said("drain duration expired with pending connections, forcefully shutting down");
    program.leaves_well();
}
