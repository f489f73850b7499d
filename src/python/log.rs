//! What the crate logs, brought to `logging.getLogger("vmitap")`.
//!
//! Records are queued, since they can be made while a lock is held, and handed over once Python may run.

use std::sync::atomic::{AtomicBool, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;
use pyo3::prelude::*;

/// Records kept until Python can take them; what comes beyond is counted.
const ROOM: usize = 1024;

/// Records, and how many there was no room for.
struct Queue {
    records: Vec<(Level, String)>,
    lost: u64,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { records: Vec::new(), lost: 0 });
static HAS_RECORDS: AtomicBool = AtomicBool::new(false);

struct Bridge;

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("vmitap")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut queue = QUEUE.lock();
        if queue.records.len() < ROOM {
            queue.records.push((record.level(), record.args().to_string()));
        } else {
            queue.lost += 1;
        }
        HAS_RECORDS.store(true, Ordering::Release);
    }

    fn flush(&self) {}
}

/// Makes the bridge the process's logger, unless it has one.
pub fn install() {
    if log::set_logger(&Bridge).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
}

/// Hands over what is queued.
pub fn flush(py: Python<'_>) {
    if HAS_RECORDS.load(Ordering::Relaxed) {
        hand_over(py);
    }
}

#[cold]
fn hand_over(py: Python<'_>) {
    HAS_RECORDS.store(false, Ordering::Release);
    let Queue { mut records, lost } = std::mem::replace(&mut *QUEUE.lock(), Queue { records: Vec::new(), lost: 0 });
    if lost > 0 {
        records.push((Level::Warn, format!("{lost} records were lost: more than {ROOM} came at once")));
    }
    let deliver = || {
        let logger = py.import("logging")?.call_method1("getLogger", ("vmitap",))?;
        for (level, message) in &records {
            let number = match level {
                Level::Error => 40,
                Level::Warn => 30,
                Level::Info => 20,
                Level::Debug | Level::Trace => 10,
            };
            logger.call_method1("log", (number, "%s", message))?;
        }
        PyResult::Ok(())
    };
    if let Err(error) = deliver() {
        error.write_unraisable(py, None);
    }
}
