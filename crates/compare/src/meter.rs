//! What the operating system says of this process: the time, the processor time it took, and its memory.
//!
//! The clock is one that all processes of the machine share, so that a run may start in one and end in another.

use serde::{Deserialize, Serialize};

use crate::Result;

/// Nanoseconds: of the machine's clock, and of processor time (user and system, all threads) so far.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Moment {
    pub(crate) clock_ns: u64,
    pub(crate) cpu_ns: u64,
}

#[cfg(unix)]
impl Moment {
    pub(crate) fn now() -> Result<Moment> {
        use nix::sys::resource::{UsageWho, getrusage};
        use nix::sys::time::TimeValLike;
        use nix::time::{ClockId, clock_gettime};

        let clock = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        let cpu = usage.user_time() + usage.system_time();
        Ok(Moment { clock_ns: clock.num_nanoseconds() as u64, cpu_ns: cpu.num_microseconds() as u64 * 1_000 })
    }
}

#[cfg(not(unix))]
impl Moment {
    pub(crate) fn now() -> Result<Moment> {
        Err("this system does not say how much processor time a process took; compare needs Unix".into())
    }
}

/// Resident memory of this process in KiB.
pub(crate) fn resident_kib() -> Result<u64> {
    status("VmRSS:")
}

/// The most resident memory that this process has had, in KiB.
///
/// From `/proc`, because what `getrusage` says starts with the memory of the process that started this one.
pub(crate) fn peak_resident_kib() -> Result<u64> {
    status("VmHWM:")
}

fn status(key: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line =
        status.lines().find_map(|line| line.strip_prefix(key)).ok_or("/proc/self/status lacks what is wanted")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Lets this process, and those that it starts, open as many files as the system allows; returns how many.
#[cfg(unix)]
pub(crate) fn raise_open_files() -> Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(most)
}

#[cfg(not(unix))]
pub(crate) fn raise_open_files() -> Result<u64> {
    Ok(512)
}
