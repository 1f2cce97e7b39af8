//! A bound on bytes that is shared: by the connections of a listener, by several listeners, or by all of a process.
//!
//! Invariant: whoever has charged something gives it back when it is gone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

/// What all listeners and connections of a process share unless they are given something else.
const OF_PROCESS: usize = 1024 * 1024 * 1024;

static PROCESS: LazyLock<MemoryBudget> = LazyLock::new(|| MemoryBudget::new(OF_PROCESS));

/// Bytes that the unfinished messages of several connections may take together, and on those that were dialled replies in
/// acknowledged streams that wait for their handlers. Cheap to clone: clones are one budget.
///
/// A number of bytes becomes a budget of its own by `into()`.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use buffstreams::{Listener, MemoryBudget};
///
/// // These two together; the rest of the process has what it had.
/// let budget = MemoryBudget::new(64 << 20);
/// let public = Listener::builder().receive_memory(budget.clone()).bind("127.0.0.1:0").await?;
/// let partners = Listener::builder().receive_memory(budget.clone()).bind("127.0.0.1:0").await?;
/// assert_eq!(budget.taken(), 0);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    limit: usize,
    taken: AtomicUsize,
}

impl MemoryBudget {
    /// So many bytes, for whoever is given this or a clone of it.
    pub fn new(bytes: usize) -> MemoryBudget {
        MemoryBudget(Arc::new(Budget { limit: bytes, taken: AtomicUsize::new(0) }))
    }

    /// The budget of the process, 1 GiB: that of all listeners and connections that were given no other.
    pub fn of_process() -> MemoryBudget {
        PROCESS.clone()
    }

    /// How many bytes may be taken.
    pub fn limit(&self) -> usize {
        self.0.limit
    }

    /// How many are taken now. A little more than the limit for a moment, when somebody is being closed for that.
    pub fn taken(&self) -> usize {
        self.0.taken.load(Ordering::Relaxed)
    }

    /// Somebody who had charged `before` has `now`. Returns whether more was taken, and that is too much.
    pub(crate) fn charge(&self, before: usize, now: usize) -> bool {
        if now <= before {
            self.0.taken.fetch_sub(before - now, Ordering::Relaxed);
            return false;
        }
        let more = now - before;
        self.0.taken.fetch_add(more, Ordering::Relaxed) + more > self.0.limit
    }
}

impl From<usize> for MemoryBudget {
    fn from(bytes: usize) -> MemoryBudget {
        MemoryBudget::new(bytes)
    }
}
