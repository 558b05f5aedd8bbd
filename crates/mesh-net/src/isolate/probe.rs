//! Whether this machine lets us build a mesh out of namespaces, found out by doing it.

use std::{
    ffi::OsStr,
    fmt, fs,
    io::{self, Write},
    path::Path,
    process::{ExitCode, Stdio},
};

use super::{IsolateError, Isolated, Step};
use crate::{
    link::Netlink,
    netns::NetNs,
    nft::{Batch, Family, Nft},
};

/// Why namespaces cannot be used here, and what would change that; one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refusal {
    pub cause: String,
    pub remedy: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; remedy: {}", self.cause, self.remedy)
    }
}

/// Runs the real operations in a short-lived child: namespaces, a veth pair, an nf_tables table. `program` with `args` must be one
/// that calls [`probe_child_main`], in general this very program.
pub fn probe<A: AsRef<OsStr>>(program: &Path, args: &[A]) -> Result<(), Refusal> {
    let mut isolated = Isolated::new(program);
    isolated.command().args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let failure = match isolated.spawn() {
        Err(error) => Failure::of_isolation(&error),
        Ok(child) => match child.wait_with_output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => Failure::of_child(&String::from_utf8_lossy(&output.stdout)),
            Err(error) => Failure { operation: "wait for the probe".into(), errno: error.raw_os_error() },
        },
    };
    Err(explain(&failure, &Facts::of_this_machine()))
}

/// The child's half of [`probe`]: tries, and says on standard output what failed.
pub fn probe_child_main() -> ExitCode {
    let Err((operation, errno)) = operations() else { return ExitCode::SUCCESS };
    // If even this fails, the parent reports an unnamed operation.
    drop(writeln!(io::stdout(), "{} {operation}", errno.unwrap_or(0)));
    ExitCode::FAILURE
}

fn operations() -> Result<(), (&'static str, Option<i32>)> {
    let io = |operation| move |e: io::Error| (operation, e.raw_os_error());
    let netlink = |operation| move |e: crate::NetlinkError| (operation, e.source.raw_os_error());
    let ns = NetNs::create().map_err(io(NETNS))?;
    Netlink::open().map_err(io(VETH))?.add_veth("probe0", "probe1", Some(&ns), None).map_err(netlink(VETH))?;
    let mut batch = Batch::new(Family::Inet);
    batch.add_table("probe");
    Nft::in_ns(&ns).map_err(io(NFT))?.apply(batch).map_err(netlink(NFT))
}

const NETNS: &str = "create a network namespace";
const VETH: &str = "create a veth pair";
const NFT: &str = "add an nf_tables table";

struct Failure {
    operation: String,
    errno: Option<i32>,
}

impl Failure {
    fn of_isolation(error: &IsolateError) -> Self {
        let operation = match error.step {
            Step::Exec => "start the probe".to_owned(),
            step => step.text().to_owned(),
        };
        Self { operation, errno: error.source.raw_os_error() }
    }

    fn of_child(report: &str) -> Self {
        let (errno, operation) = report.trim().split_once(' ').unwrap_or(("", "run the probe"));
        Self { operation: operation.to_owned(), errno: errno.parse().ok().filter(|errno| *errno != 0) }
    }
}

/// What the machine says about its restrictions.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    max_user_namespaces: Option<u64>,
    unprivileged_userns_clone: Option<u64>,
    apparmor_restricts: bool,
    seccomp: bool,
    container: bool,
}

impl Facts {
    fn of_this_machine() -> Self {
        let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        let seccomp = fs::read_to_string("/proc/self/status").is_ok_and(|s| s.lines().any(|l| l == "Seccomp:\t2"));
        Self {
            max_user_namespaces: number("/proc/sys/user/max_user_namespaces"),
            unprivileged_userns_clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
            apparmor_restricts: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1),
            seccomp,
            container: ["/.dockerenv", "/run/.containerenv"].iter().any(|p| Path::new(p).exists()),
        }
    }
}

/// The likeliest cause, most specific first.
fn explain(failure: &Failure, facts: &Facts) -> Refusal {
    let refusal = |cause: String, remedy: &str| Refusal { cause, remedy: remedy.to_owned() };
    let denied = matches!(failure.errno, Some(libc::EPERM | libc::EACCES));
    let reason = failure.errno.map_or_else(String::new, |e| format!(": {}", io::Error::from_raw_os_error(e)));
    let what = format!("cannot {}{reason}", failure.operation);
    if facts.max_user_namespaces == Some(0) || failure.errno == Some(libc::ENOSPC) {
        return refusal(
            format!("{what}: user.max_user_namespaces allows no more user namespaces"),
            "sudo sysctl user.max_user_namespaces=15000",
        );
    }
    if facts.unprivileged_userns_clone == Some(0) && denied {
        return refusal(
            format!("{what}: kernel.unprivileged_userns_clone is 0"),
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        );
    }
    if (facts.container || facts.seccomp) && denied {
        return refusal(
            format!("{what}: the container's seccomp or AppArmor profile refuses it"),
            "start the container with --privileged, or with --security-opt seccomp=unconfined --security-opt apparmor=unconfined",
        );
    }
    if facts.apparmor_restricts && denied {
        return refusal(
            format!("{what}: kernel.apparmor_restrict_unprivileged_userns is 1"),
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or run as root",
        );
    }
    match failure.operation.as_str() {
        NFT => refusal(format!("{what}: the kernel lacks nf_tables"), "sudo modprobe nf_tables nft_chain_nat"),
        VETH => refusal(format!("{what}: the kernel lacks veth"), "sudo modprobe veth"),
        _ => refusal(what, "run as root on a kernel with user and network namespaces"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(operation: &str, errno: i32, facts: Facts) -> String {
        let refusal = explain(&Failure { operation: operation.into(), errno: Some(errno) }, &facts);
        assert!(!refusal.to_string().contains('\n'));
        refusal.to_string()
    }

    #[test]
    fn each_known_restriction_is_named_with_its_remedy() {
        let none = Facts { max_user_namespaces: Some(100), ..Facts::default() };
        let limited = Facts { max_user_namespaces: Some(0), ..none };
        assert!(cause("create namespaces", libc::EPERM, limited).contains("user.max_user_namespaces=15000"));
        let apparmor = Facts { apparmor_restricts: true, ..none };
        assert!(cause("mount", libc::EACCES, apparmor).contains("apparmor_restrict_unprivileged_userns=0"));
        let docker = Facts { container: true, seccomp: true, ..none };
        assert!(cause("create namespaces", libc::EPERM, docker).contains("--privileged"));
        assert!(cause(NFT, libc::EOPNOTSUPP, none).contains("modprobe nf_tables"));
        assert!(cause(VETH, libc::EOPNOTSUPP, none).contains("modprobe veth"));
        assert!(cause("create namespaces", libc::EINVAL, none).contains("run as root"));
    }

    #[test]
    fn a_silent_or_garbled_probe_is_still_explained() {
        for report in ["", "x", "99999999999 y", "1"] {
            explain(&Failure::of_child(report), &Facts::default());
        }
        assert_eq!(Failure::of_child("95 add an nf_tables table\n").operation, NFT);
    }
}
