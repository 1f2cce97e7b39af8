//! What the keeper promises, over a disk that can be held up, broken, and looked at as a power cut would leave it.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join_all;
use redb::StorageBackend;
use tokio::sync::{Semaphore, mpsc};

use super::*;
use crate::async_handler::async_handler;
use crate::connection::{Connection, ConnectionBuilder};
use crate::handler::HandlerError;
use crate::listener::{Listener, Server};
use crate::retry::Retry;

/// Whatever is waited for is there long before.
const PATIENCE: Duration = Duration::from_secs(60);

/// Nobody listens there.
const NOBODY: &str = "127.0.0.1:1";

/// A disk in memory. What was written before the last fsync began outlives a power cut, and nothing else does.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk(Arc<(Mutex<Platter>, Condvar)>);

#[derive(Debug, Default)]
struct Platter {
    written: Vec<u8>,
    lasting: Vec<u8>,
    /// An fsync is to wait; one does.
    is_held: bool,
    waits: bool,
    is_broken: bool,
    /// As the store may over what is damaged.
    panics: bool,
}

impl Disk {
    pub(super) fn with(bytes: Vec<u8>) -> Disk {
        let disk = Disk::default();
        disk.platter().written = bytes;
        disk
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on it, whether it would outlive a power cut or not.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.platter().written.clone()
    }

    fn after_power_cut(&self) -> Disk {
        Disk::with(self.platter().lasting.clone())
    }

    pub(super) fn open(&self, max_bytes: u64) -> Result<Spool> {
        Spool::look_through(Store::on(self.clone())?, Path::new("on a disk of its own"), max_bytes)
    }

    fn spool(&self) -> Spool {
        self.open(u64::MAX).unwrap()
    }

    /// The next fsync waits.
    fn hold(&self) {
        self.platter().is_held = true;
    }

    /// Waits for that.
    async fn held(&self) {
        let disk = self.clone();
        let wait = move || {
            let waits = disk.0.1.wait_timeout_while(disk.platter(), PATIENCE, |platter| !platter.waits);
            assert!(!waits.unwrap().1.timed_out(), "nothing is written");
        };
        tokio::task::spawn_blocking(wait).await.unwrap();
    }

    fn go_on(&self) {
        self.platter().is_held = false;
        self.0.1.notify_all();
    }

    /// From now on nothing can be written.
    fn break_down(&self) {
        self.platter().is_broken = true;
    }

    fn panic(&self) {
        self.platter().panics = true;
    }
}

impl Platter {
    fn check(&self) -> io::Result<()> {
        assert!(!self.panics, "as a store that finds what cannot be");
        if self.is_broken { Err(io::Error::other("the disk is broken")) } else { Ok(()) }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.platter().written.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (platter, offset) = (self.platter(), offset as usize);
        let bytes = platter.written.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.platter();
        platter.check()?;
        platter.written.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.platter();
        let written = platter.written.clone();
        while platter.is_held {
            platter.waits = true;
            self.0.1.notify_all();
            platter = self.0.1.wait(platter).unwrap();
        }
        platter.waits = false;
        platter.check()?;
        platter.lasting = written;
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut platter, offset) = (self.platter(), offset as usize);
        platter.check()?;
        let place = platter.written.get_mut(offset..offset + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        place.copy_from_slice(data);
        Ok(())
    }
}

fn builder() -> ConnectionBuilder {
    Connection::builder().retry(Retry::Forever)
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Polls it once.
async fn is_pending(mut future: Pin<&mut impl Future>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

#[tokio::test]
async fn a_message_is_accepted_when_it_outlives_a_power_cut_and_not_before() {
    let disk = Disk::default();
    let connection = builder().dial_spooled(NOBODY, disk.spool()).unwrap();
    assert_eq!(disk.after_power_cut().spool().state.starts, 1, "nobody else begins with the same epochs");
    for number in 1..=3 {
        disk.hold();
        let mut send = pin!(connection.send(b"hello"));
        assert!(is_pending(send.as_mut()).await);
        disk.held().await;
        assert!(is_pending(send.as_mut()).await, "it is ready before it is on disk");
        assert_eq!(connection.stats().accepted, number - 1, "and so it is not to be sent yet");
        disk.go_on();
        let receipt = in_time("it is written", send).await.unwrap();
        assert_eq!(receipt.number(), number);
        let left = disk.after_power_cut().spool();
        assert_eq!((left.next_number(), left.recovered()), (number + 1, number));
        assert_eq!(left.stream_id(), connection.stream_id());
    }
}

#[tokio::test]
async fn sends_that_gather_behind_a_write_share_the_next_keep_their_order_and_are_all_woken() {
    let disk = Disk::default();
    let connection = builder().max_message_size(100_000).dial_spooled(NOBODY, disk.spool()).unwrap();
    disk.hold();
    let mut first = pin!(connection.send(b"first"));
    assert!(is_pending(first.as_mut()).await);
    disk.held().await;
    let large = vec![7; 100_000];
    let mut others = pin!(join_all((0..100).map(|_| connection.send(&large))));
    assert!(is_pending(others.as_mut()).await);
    disk.go_on();
    in_time("the first is written", first).await.unwrap();
    let others = in_time("so are the others", others).await;
    let numbers: Vec<_> = others.into_iter().map(|receipt| receipt.unwrap().number()).collect();
    assert!(numbers.into_iter().eq(2..=101));
    in_time("closing", connection.close(Duration::ZERO)).await.unwrap();
    let spool = disk.spool();
    assert_eq!((spool.extents[0].end, spool.recovered()), (2, 101));
    let (all, most) = (100 * 100_003, 4 * 1024 * 1024);
    assert!(spool.extents.iter().all(|extent| extent.bytes <= most + RECORD_COST), "{:?}", spool.extents);
    assert_eq!(spool.extents[1].bytes, most / 100_003 * 100_003 + RECORD_COST, "as many as may wait share a write");
    assert_eq!(spool.live_bytes(), 6 + all + RECORD_COST * spool.extents.len() as u64);
}

#[tokio::test]
async fn what_was_gathered_before_the_end_is_written_and_those_who_wait_for_room_are_told_of_it() {
    let disk = Disk::default();
    let connection = builder().dial_spooled(NOBODY, disk.open(2_000).unwrap()).unwrap();
    disk.hold();
    let mut first = pin!(connection.send(&[1; 500]));
    assert!(is_pending(first.as_mut()).await);
    disk.held().await;
    let mut second = pin!(connection.send(&[2; 500]));
    assert!(is_pending(second.as_mut()).await);
    let mut third = pin!(connection.send(&[3; 500]));
    assert!(is_pending(third.as_mut()).await, "there is no room for it");
    let mut closing = pin!(connection.close(Duration::ZERO));
    assert!(is_pending(closing.as_mut()).await);
    in_time("the connection is closed", connection.closed()).await;
    let error = in_time("who waits for room is told", third).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(is_pending(closing.as_mut()).await, "it is not written yet");
    disk.go_on();
    in_time("the first is written", first).await.unwrap();
    in_time("the second is, too", second).await.unwrap();
    assert_eq!(in_time("closing", closing).await.unwrap().in_flight, 2);
    assert_eq!(disk.after_power_cut().spool().recovered(), 2);
}

#[tokio::test]
async fn when_a_write_fails_whoever_waits_is_told_and_nothing_more_is_accepted_or_written() {
    let disk = Disk::default();
    let connection = builder().dial_spooled(NOBODY, disk.open(2_000).unwrap()).unwrap();
    in_time("it is written", connection.send(&[0; 10])).await.unwrap();
    disk.hold();
    let mut first = pin!(connection.send(&[1; 500]));
    assert!(is_pending(first.as_mut()).await);
    disk.held().await;
    let mut second = pin!(connection.send(&[2; 500]));
    assert!(is_pending(second.as_mut()).await);
    let mut third = pin!(connection.send(&[3; 500]));
    assert!(is_pending(third.as_mut()).await, "there is no room for it");
    disk.break_down();
    disk.go_on();
    for gathered in [first, second] {
        let error = in_time("it is told", gathered).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spool);
        assert!(error.to_string().contains("the disk is broken"), "{error}");
    }
    in_time("who waits for room is told", third).await.unwrap_err();
    in_time("it is over", connection.closed()).await;
    in_time("nothing is accepted", connection.send(b"late")).await.unwrap_err();
    assert_eq!(connection.stats().accepted, 1);
    let error = in_time("closing", connection.close(PATIENCE)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spool);
    let left = disk.after_power_cut().spool();
    assert_eq!((left.recovered(), left.next_number()), (1, 2));
}

#[tokio::test]
async fn a_store_that_panics_is_a_broken_spool_and_takes_nobody_with_it() {
    let disk = Disk::default();
    let connection = builder().dial_spooled(NOBODY, disk.spool()).unwrap();
    in_time("it is written", connection.send(b"kept")).await.unwrap();
    disk.panic();
    let error = in_time("it is told", connection.send(b"lost")).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Spool && error.to_string().contains("is damaged"), "{error}");
    let error = in_time("closing", connection.close(PATIENCE)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spool);
    assert_eq!(disk.after_power_cut().spool().recovered(), 1);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_any_more_ends_the_connection_which_says_so() {
    let disk = Disk::default();
    let mut spool = disk.spool();
    assert_eq!(spool.append(["gone"]).unwrap(), 1);
    spool.store.commit(&Change { remove: vec![1], ..Change::default() }, spool.state).unwrap();
    let connection = builder().dial_spooled(NOBODY, spool).unwrap();
    in_time("it is over", connection.closed()).await;
    let error = in_time("closing", connection.close(PATIENCE)).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Spool && error.to_string().contains("not there any more"), "{error}");
}

/// Rejects what is bad and finishes what is slow as soon as it is permitted to, and never finishes what is stuck.
async fn judge(permits: &Arc<Semaphore>) -> Server {
    let permits = Arc::clone(permits);
    let service = async_handler(move |message: Bytes, _| {
        let permits = Arc::clone(&permits);
        async move {
            match &message[..] {
                b"bad" | b"slow" => permits.acquire().await.unwrap().forget(),
                b"stuck" => std::future::pending().await,
                _ => {}
            }
            if message == "bad" { Err(HandlerError::rejected(1, "it is bad")) } else { Ok(()) }
        }
    });
    Listener::bind("127.0.0.1:0").await.unwrap().spawn(service.concurrency(2))
}

#[tokio::test]
async fn a_refused_message_is_kept_before_its_owner_is_told_and_is_not_sent_again_with_others_of_its_record() {
    let disk = Disk::default();
    assert_eq!(disk.spool().append(["stuck", "bad"]).unwrap(), 2);
    let permits = Arc::new(Semaphore::new(0));
    let server = judge(&permits).await;
    let (tell, mut told) = mpsc::channel(8);
    let connection = builder().failed_to(tell).dial_spooled(server.local_address(), disk.spool()).unwrap();
    disk.hold();
    permits.add_permits(1);
    disk.held().await;
    assert!(told.try_recv().is_err(), "it is not on disk");
    disk.go_on();
    assert_eq!(in_time("it is told", told.recv()).await.unwrap().number, 2);
    assert_eq!(disk.after_power_cut().spool().failed_count(), 1);
    in_time("closing", connection.close(Duration::ZERO)).await.unwrap();

    let spool = disk.after_power_cut().spool();
    assert_eq!((spool.recovered(), spool.failed_count(), spool.damage().len()), (1, 1, 0));
    let (seen, mut see) = mpsc::unbounded_channel();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(move |message: &[u8]| {
        seen.send(message.to_vec()).unwrap();
        Ok(())
    });
    let connection = builder().dial_spooled(server.local_address(), spool).unwrap();
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (1, 0));
    assert_eq!((see.recv().await.unwrap(), see.try_recv().is_err()), (b"stuck".to_vec(), true));
}

#[tokio::test]
async fn what_is_settled_makes_room_for_who_waits_for_it() {
    let disk = Disk::default();
    let permits = Arc::new(Semaphore::new(0));
    let server = judge(&permits).await;
    // Room for one at a time.
    let connection = builder().dial_spooled(server.local_address(), disk.open(300).unwrap()).unwrap();
    for _ in 0..3 {
        in_time("it is written", connection.send(b"slow")).await.unwrap();
        let mut next = pin!(connection.send(b"slow"));
        assert!(is_pending(next.as_mut()).await, "there is no room for it");
        permits.add_permits(1);
        in_time("there is room", next).await.unwrap();
        permits.add_permits(1);
        in_time("it is flushed", connection.flush()).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_done_leaves_nothing_on_disk_but_what_was_refused() {
    let disk = Disk::default();
    let server = judge(&Arc::new(Semaphore::new(10))).await;
    let connection = builder().dial_spooled(server.local_address(), disk.spool()).unwrap();
    for message in ["good", "bad", "good", "bad", "good"] {
        connection.send(message.as_bytes()).await.unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(in_time("closing", connection.close(PATIENCE)).await.unwrap().in_flight, 0);
    let store = Store::on(disk.after_power_cut()).unwrap();
    store.records(|first, _| panic!("the record of message {first} is still there")).unwrap();
    assert_eq!((store.gone().unwrap(), store.failed_size().unwrap().0), (vec![], 2));
}
