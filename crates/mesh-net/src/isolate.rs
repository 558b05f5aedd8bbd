//! Programs in namespaces of their own, without root: the lab, its pods, and tests that need a real kernel.
//!
//! Namespaces are entered in the child between fork and exec. That child has one thread whatever the parent has, which is what
//! `unshare(NEWUSER)` demands.

use std::{
    ffi::{CString, OsStr},
    fs,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command},
    ptr,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, killpg},
    unistd::{Pid, getegid, geteuid},
};

use crate::netns::NetNs;

mod harness;
mod probe;

pub use harness::test_main;
pub use probe::{Refusal, probe, probe_child_main};

/// A program as pid 1 in new user, network, mount, pid, ipc and uts namespaces. Inside it is root (mapped to the caller), `/proc`
/// and `/sys` show the new namespaces where the kernel allows it, `/run` is empty, and mounts do not spread outside.
///
/// The spawned [`Child`] is a waiter outside the pid namespace: it passes on signals it gets and the program's exit code, and when
/// it dies everything inside dies.
#[derive(Debug)]
pub struct Isolated {
    command: Command,
    die_with_parent: bool,
}

impl Isolated {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), die_with_parent: false }
    }

    /// Arguments, environment and standard streams of the program.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Kills everything inside when the *thread* that spawns ends, however it ends.
    pub fn die_with_parent(&mut self) -> &mut Self {
        self.die_with_parent = true;
        self
    }

    /// Starts the program; the error names the step the kernel refused.
    pub fn spawn(mut self) -> Result<Child, IsolateError> {
        let (mut failed_step, report) = io::pipe().map_err(|e| IsolateError { step: Step::Fork, source: e })?;
        let plan = Plan::new(self.die_with_parent, OwnedFd::from(report));
        // SAFETY: the closure runs in the forked child and makes only system calls on data prepared before the fork.
        unsafe { self.command.pre_exec(move || plan.enter()) };
        let spawned = self.command.spawn();
        drop(self.command);
        spawned.map_err(|source| {
            let mut steps = Vec::new();
            // The last writer is gone: the child has ended and `command` is dropped.
            let read = failed_step.read_to_end(&mut steps);
            let step = read.ok().and_then(|_| steps.last()).map_or(Step::Exec, |byte| Step::from_byte(*byte));
            IsolateError { step, source }
        })
    }
}

/// A step of entering namespaces that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {}", .step.text())]
pub struct IsolateError {
    pub step: Step,
    #[source]
    pub source: io::Error,
}

/// The steps of [`Isolated::spawn`], in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Unshare,
    MapUser,
    Fork,
    Mounts,
    Exec,
}

impl Step {
    const ALL: [Self; 5] = [Self::Unshare, Self::MapUser, Self::Fork, Self::Mounts, Self::Exec];

    fn from_byte(byte: u8) -> Self {
        Self::ALL.get(usize::from(byte)).copied().unwrap_or(Self::Exec)
    }

    fn text(self) -> &'static str {
        match self {
            Self::Unshare => "create namespaces",
            Self::MapUser => "map the user into the new namespace",
            Self::Fork => "fork",
            Self::Mounts => "mount the new namespace's file systems",
            Self::Exec => "start the program",
        }
    }
}

/// What the child does between fork and exec; everything it needs was allocated before.
struct Plan {
    uid_map: Vec<u8>,
    gid_map: Vec<u8>,
    run_dirs: Vec<CString>,
    die_with_parent: bool,
    report: OwnedFd,
}

impl Plan {
    fn new(die_with_parent: bool, report: OwnedFd) -> Self {
        let is_real_dir = |path: &&str| fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
        let run_dirs = ["/run", "/var/run"].iter().filter(|p| is_real_dir(p)).filter_map(|p| CString::new(*p).ok());
        Self {
            uid_map: format!("0 {} 1", geteuid()).into_bytes(),
            gid_map: format!("0 {} 1", getegid()).into_bytes(),
            run_dirs: run_dirs.collect(),
            die_with_parent,
            report,
        }
    }

    fn enter(&self) -> io::Result<()> {
        self.begin(Step::Unshare);
        unshare(
            CloneFlags::CLONE_NEWUSER
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS,
        )?;
        self.begin(Step::MapUser);
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", &self.uid_map)?;
        write_file(c"/proc/self/gid_map", &self.gid_map)?;
        // After unshare: a change of credentials clears the death signal.
        if self.die_with_parent {
            die_with_parent()?;
        }
        self.begin(Step::Fork);
        become_child_of_waiter()?;
        self.begin(Step::Mounts);
        self.mount_fresh()?;
        self.begin(Step::Exec);
        Ok(())
    }

    fn mount_fresh(&self) -> io::Result<()> {
        private_mounts()?;
        for dir in &self.run_dirs {
            mount(c"tmpfs", dir, Some(c"tmpfs"), libc::MS_NOSUID | libc::MS_NODEV)?;
        }
        // A container with masked paths may refuse these two; without them the old ones stay visible, which hurts nobody.
        let quiet = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        drop(mount(c"proc", c"/proc", Some(c"proc"), quiet));
        drop(mount(c"sysfs", c"/sys", Some(c"sysfs"), quiet));
        Ok(())
    }

    /// Leaves a trace for the parent, which otherwise sees only an errno.
    fn begin(&self, step: Step) {
        let byte = step as u8;
        // SAFETY: one byte from a live variable to an open descriptor.
        unsafe { libc::write(self.report.as_raw_fd(), (&raw const byte).cast(), 1) };
    }
}

/// What a pod sees that its node does not.
#[derive(Clone, Debug)]
pub struct PodSandbox {
    pub netns: NetNs,
    /// Shown as `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// Shown as `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// Kills the process when the thread that spawned it ends.
    pub die_with_parent: bool,
}

impl PodSandbox {
    /// Makes `command` run in the sandbox, in a process group of its own (see [`kill_group`]). Errors are about the files to show.
    pub fn confine<'a>(&self, command: &'a mut Command) -> io::Result<&'a mut Command> {
        let mut binds = Vec::new();
        for (file, target) in [(&self.hosts, "/etc/hosts"), (&self.resolv_conf, "/etc/resolv.conf")] {
            if let Some(file) = file {
                binds.push((c_path(&fs::canonicalize(file)?)?, c_path(&mount_target(Path::new(target))?)?));
            }
        }
        let (netns, die) = (self.netns.clone(), self.die_with_parent);
        let enter = move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            unshare(CloneFlags::CLONE_NEWNS)?;
            private_mounts()?;
            for (file, target) in &binds {
                mount(file, target, None, libc::MS_BIND)?;
            }
            if die { die_with_parent() } else { Ok(()) }
        };
        // SAFETY: the closure runs in the forked child and makes only system calls on data prepared before the fork.
        unsafe { command.pre_exec(enter) };
        Ok(command.process_group(0))
    }
}

/// Signals a process group, for example that of a [`PodSandbox::confine`]d command; no error when it is gone.
pub fn kill_group(leader: u32, signal: i32) -> io::Result<()> {
    let signal = Signal::try_from(signal)?;
    match killpg(Pid::from_raw(leader.cast_signed()), signal) {
        Err(Errno::ESRCH) => Ok(()),
        done => Ok(done?),
    }
}

/// Makes `command`'s process die (SIGKILL) when the thread that spawns it ends, however that ends.
pub fn die_with_spawner(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs in the forked child and makes one system call.
    unsafe { command.pre_exec(die_with_parent) }
}

/// The file a bind mount on `path` covers. In a lab `/run` is empty, so a `resolv.conf` that points there needs its target made.
fn mount_target(path: &Path) -> io::Result<PathBuf> {
    if let Ok(target) = fs::canonicalize(path) {
        return Ok(target);
    }
    let target = path.parent().unwrap_or_else(|| Path::new("/")).join(fs::read_link(path)?);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&target, "")?;
    fs::canonicalize(target)
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

// --- Between fork and exec: system calls only, no allocation, no locks.

fn private_mounts() -> io::Result<()> {
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)
}

fn mount(
    source: &std::ffi::CStr,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let kind = kind.map_or(ptr::null(), std::ffi::CStr::as_ptr);
    // SAFETY: NUL-terminated strings that outlive the call; no data argument.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, ptr::null()) }).map(drop)
}

fn write_file(path: &std::ffi::CStr, content: &[u8]) -> io::Result<()> {
    // SAFETY: a NUL-terminated path, a buffer with its own length, and a descriptor that is closed once.
    unsafe {
        let fd = check(libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))?;
        let written = libc::write(fd, content.as_ptr().cast(), content.len());
        let error = io::Error::last_os_error();
        libc::close(fd);
        if usize::try_from(written) == Ok(content.len()) { Ok(()) } else { Err(error) }
    }
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: prctl with integer arguments.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }).map(drop)
}

/// `unshare(NEWPID)` counts only for children: forks, goes on in the child (pid 1), and stays behind in the parent as its waiter.
fn become_child_of_waiter() -> io::Result<()> {
    // The waiter collects signals instead of dying of them; the child gets the old mask back.
    // SAFETY: signal sets are plain data initialised by sigfillset; fork in a process with one thread.
    unsafe {
        // The parent may have chosen to ignore ended children; the waiter must hear of this one.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before))?;
        match check(libc::fork())? {
            0 => {
                check(libc::sigprocmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()))?;
                die_with_parent()
            }
            child => wait_for(child, &all),
        }
    }
}

/// Passes signals on to `child` and ends as it ends.
fn wait_for(child: libc::pid_t, signals: &libc::sigset_t) -> ! {
    const STANDARD_STREAMS: RawFd = 3;
    // Everything but the standard streams: the parent waits for the end of pipes of which we hold a copy.
    // SAFETY: closing descriptors that nothing in this process uses any more; integers otherwise.
    unsafe {
        libc::syscall(libc::SYS_close_range, STANDARD_STREAMS, RawFd::MAX, 0);
        loop {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let signal = libc::sigwaitinfo(signals, &raw mut info);
            let mut status = 0;
            if libc::waitpid(child, &raw mut status, libc::WNOHANG) == child {
                let code =
                    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
                libc::_exit(code);
            }
            // A terminal signals the whole foreground group, child included; only what was sent to us alone goes on.
            if signal > 0 && signal != libc::SIGCHLD && info.si_code <= 0 {
                libc::kill(child, signal);
            }
        }
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
