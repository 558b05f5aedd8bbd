//! Network namespaces as values: identified by what they are, entered for one closure, left for certain.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    process, ptr,
    sync::Arc,
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::link::Netlink;

/// Identity of a namespace, the same for every descriptor and path that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetNsId {
    pub dev: u64,
    pub ino: u64,
}

/// A network namespace, kept alive by its descriptor; clones share it.
#[derive(Clone, Debug)]
pub struct NetNs(Arc<OwnedFd>);

impl NetNs {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        // thread-self: setns moves one thread, so `/proc/self` could name another one's namespace.
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace a path names: `/proc/<pid>/ns/net` or a bind mount of it.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// Takes a descriptor that came from elsewhere; `InvalidInput` unless it is a network namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; on other descriptors it fails with ENOTTY.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a network namespace"));
        }
        Ok(Self(Arc::new(fd)))
    }

    /// A new namespace with only `lo`, which is up; it lives as long as a descriptor, a mount or a process holds it.
    pub fn create() -> io::Result<Self> {
        on_fresh_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let mut netlink = Netlink::open()?;
            netlink.set_up(LOOPBACK_INDEX).map_err(io::Error::other)?;
            Self::current()
        })?
    }

    /// What decides whether two descriptors mean the same namespace.
    pub fn id(&self) -> io::Result<NetNsId> {
        let stat = nix::sys::stat::fstat(&*self.0)?;
        Ok(NetNsId { dev: stat.st_dev, ino: stat.st_ino })
    }

    /// Runs `f` on this thread inside the namespace and comes home, also when `f` panics. Sockets that `f` creates keep the
    /// namespace. Nothing in `f` may wait for long: the thread serves nobody else meanwhile.
    ///
    /// A thread that cannot come home would put other pods' traffic on the wrong wires, so the process aborts then.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = Self::current()?;
        setns(&*self.0, CloneFlags::CLONE_NEWNET)?;
        let _home = ComeHome(home);
        Ok(f())
    }

    /// As [`NetNs::run`], on a thread of its own that ends with `f`: for work that takes longer.
    pub fn run_on_thread<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_fresh_thread(|| {
            setns(&*self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })?
    }

    /// Gives the namespace a name in the file system, as container runtimes do. The file must not exist.
    pub fn bind_mount(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let path = path.as_ref();
        File::options().write(true).create_new(true).open(path)?;
        let source = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let mounted = mount(Some(source.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>);
        if mounted.is_err() {
            fs::remove_file(path)?;
        }
        Ok(mounted?)
    }

    /// Whether `self` and `other` are clones of one value, without asking the kernel.
    pub fn same_handle(&self, other: &Self) -> bool {
        ptr::eq(Arc::as_ptr(&self.0), Arc::as_ptr(&other.0))
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `lo` is the first interface of every namespace.
const LOOPBACK_INDEX: u32 = 1;

struct ComeHome(NetNs);

impl Drop for ComeHome {
    fn drop(&mut self) {
        if let Err(errno) = setns(&*self.0.0, CloneFlags::CLONE_NEWNET) {
            eprintln!("cannot return to the home network namespace: {errno}");
            process::abort();
        }
    }
}

/// Runs `f` on a thread that is not reused, so whatever namespace it ends in is gone with it.
fn on_fresh_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<io::Result<T>> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("netns".into()).spawn_scoped(scope, f)?;
        Ok(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
