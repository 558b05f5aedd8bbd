//! The few system calls no library offers safely.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd},
};

/// `setsockopt` with an integer value.
pub(crate) fn set_int_option(socket: &impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = socklen::<i32>();
    // SAFETY: the pointer and length describe `value`, which outlives the call; the descriptor is borrowed and thus open.
    let done = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast::<libc::c_void>(), length)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `getsockopt` of an option that is a plain C structure of numbers.
pub(crate) fn struct_option<T: Plain>(socket: &impl AsFd, level: i32, name: i32) -> io::Result<T> {
    let mut value = T::zeroed();
    let mut length = socklen::<T>();
    // SAFETY: the kernel writes at most `length` bytes into `value`, and every bit pattern is valid for a `Plain` type.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast::<libc::c_void>(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[allow(clippy::cast_possible_truncation, reason = "C structures are far smaller than 4 GiB")]
pub(crate) const fn socklen<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

/// C structures for which all bytes zero, and any other bytes, are a value.
pub(crate) trait Plain: Copy {
    fn zeroed() -> Self;
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Plain for $type {
            fn zeroed() -> Self {
                // SAFETY: the structure consists of integers only.
                unsafe { mem::zeroed() }
            }
        }
    )*};
}

plain!(libc::tcp_info, libc::ucred);
