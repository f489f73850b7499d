//! The bell of a wait: no wake is lost, and the descriptor does not stay readable.

use std::time::Duration;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmitap::driver::xen::bell::{Bell, Descriptor, Flag};
use vmitap::driver::{VmiEvents, Wait};
use xen_sys::fake::Kind;

use super::{attach, guest};

#[test]
fn after_wakes_of_two_threads_were_seen_the_descriptor_is_silent() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    let readiness = driver.readiness().unwrap().unwrap();
    for round in 0..3_000 {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let waker = driver.waker();
                std::thread::spawn(move || (0..4).for_each(|_| waker.wake()))
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            assert_eq!(driver.wait(Duration::ZERO).unwrap(), Wait::Timeout);
        }
        for thread in threads {
            thread.join().unwrap();
        }
        for _ in 0..3 {
            driver.wait(Duration::ZERO).unwrap();
        }
        let mut fds = [PollFd::new(&readiness, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        assert_eq!(ready, 0, "nothing is new, and the descriptor is readable, after round {round}");
    }
}

#[test]
fn a_wait_that_is_woken_is_woken_once() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    driver.waker().wake();
    driver.waker().wake();
    let took = |driver: &mut vmitap::driver::xen::XenDriver| {
        let before = std::time::Instant::now();
        assert_eq!(driver.wait(Duration::from_millis(200)).unwrap(), Wait::Timeout);
        before.elapsed()
    };
    assert!(took(&mut driver) < Duration::from_millis(100), "what came before the wait ends it");
    assert!(took(&mut driver) >= Duration::from_millis(200), "and the next one is not ended");
}

/// A flag and a counter of loom's.
struct ModelFlag(AtomicBool);
/// The counter, and what was drained from it so far: that is for the test, and no order is tried of it.
struct ModelFd(AtomicU32, std::sync::atomic::AtomicU32);

impl Flag for ModelFlag {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

// The kernel reads and writes the counter under a lock.
impl Descriptor for ModelFd {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn drain(&self) -> bool {
        let count = self.0.swap(0, Ordering::AcqRel);
        self.1.fetch_add(count, Ordering::Relaxed);
        count != 0
    }
}

/// One way to ring, and one to take.
#[derive(Clone, Copy)]
struct Ways {
    ring: fn(&Bell<ModelFlag, ModelFd>, &ModelFlag),
    take: fn(&Bell<ModelFlag, ModelFd>, &ModelFlag) -> bool,
}

/// Every order in which threads wake, some of them more than once, and one looks.
fn in_every_order(ways: Ways, rings: &'static [u32]) {
    loom::model(move || {
        // The controls need a flag of their own.
        let aside = Arc::new(ModelFlag(AtomicBool::new(false)));
        let bell = Arc::new(Bell::new(ModelFlag(AtomicBool::new(false)), ModelFd(AtomicU32::new(0), 0.into())));
        let waker = |rings: &u32| {
            let (bell, aside, rings) = (bell.clone(), aside.clone(), *rings);
            loom::thread::spawn(move || {
                for _ in 0..rings {
                    (ways.ring)(&bell, &aside);
                }
            })
        };
        let wakers: Vec<_> = rings.iter().map(waker).collect();
        let mut seen = 0;
        let mut look = || {
            let taken = (ways.take)(&bell, &aside);
            if taken {
                // What it was woken for is seen: draining comes after each raising that it takes away.
                seen = bell.fd().1.load(Ordering::Relaxed);
            }
            taken
        };
        look();
        for waker in wakers {
            waker.join().unwrap();
        }
        // Now it is quiet, and one look has to do.
        look();
        assert_eq!(bell.fd().0.load(Ordering::Acquire), 0, "nothing keeps a poll from sleeping");
        assert!(!look(), "nobody is woken for nothing");
        assert_eq!(seen, rings.iter().sum::<u32>(), "no wake is lost");
    });
}

const RIGHT: Ways = Ways { ring: |bell, _| bell.ring(), take: |bell, _| bell.take() };

#[test]
fn in_every_order_no_wake_is_lost_and_the_descriptor_does_not_stay_readable() {
    in_every_order(RIGHT, &[1, 1]);
    in_every_order(RIGHT, &[2]);
}

#[test]
#[should_panic(expected = "nothing keeps a poll from sleeping")]
fn with_a_flag_that_is_set_first_some_order_leaves_the_descriptor_readable() {
    let ring = |bell: &Bell<ModelFlag, ModelFd>, flag: &ModelFlag| {
        flag.set();
        bell.fd().raise();
    };
    let take = |bell: &Bell<ModelFlag, ModelFd>, flag: &ModelFlag| {
        flag.is_set() && {
            flag.clear();
            bell.fd().drain()
        }
    };
    in_every_order(Ways { ring, take }, &[1]);
}

#[test]
#[should_panic(expected = "nothing keeps a poll from sleeping")]
fn with_a_flag_that_decides_some_order_leaves_it_readable_too() {
    let ring = |bell: &Bell<ModelFlag, ModelFd>, flag: &ModelFlag| {
        flag.set();
        bell.fd().raise();
    };
    let take = |bell: &Bell<ModelFlag, ModelFd>, flag: &ModelFlag| {
        flag.is_set() && {
            bell.fd().drain();
            flag.0.swap(false, Ordering::AcqRel)
        }
    };
    in_every_order(Ways { ring, take }, &[2]);
}
