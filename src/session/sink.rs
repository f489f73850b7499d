//! A file that closed batches go to while the guest runs, written by a thread of its own so that no vCPU waits for a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel};
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;

use crate::capture::{Format, Output};
use crate::error::{Result, VmiError};
use crate::symbols::SymbolTable;

/// Batches that can wait for the writer.
const QUEUE: usize = 4;
/// How long the guest is held up for a writer that is behind, before batches are given up: somebody who reads a pipe may have stopped.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a file on a disk, which goes on sooner or later.
const DISK_PATIENCE: Duration = Duration::from_secs(30);
/// How long the end of a pipe is waited for beyond that.
const END: Duration = Duration::from_secs(4);

/// The file.
pub struct Sink {
    path: String,
    format: Format,
    sender: Option<SyncSender<RecordBatch>>,
    done: Receiver<std::io::Result<()>>,
    written: Arc<AtomicU64>,
    patience: Duration,
    /// Rows that the writer was given.
    accepted: u64,
    /// Rows given up since the writer was behind for too long; more are until it has caught up.
    given_up: u64,
}

impl Sink {
    /// Opens a file; `"-"` is this process' standard output.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if it cannot be written.
    pub fn open(path: &str, format: Format, schema: &SchemaRef, symbols: &Arc<SymbolTable>) -> Result<Self> {
        let output = if path == "-" { format.stdout(schema, symbols) } else { format.create(path, schema, symbols) };
        let output = output.map_err(|error| failed(path, &error, 0))?;
        let (sender, batches) = sync_channel(QUEUE);
        let (end, done) = channel();
        let written = Arc::new(AtomicU64::new(0));
        let counter = written.clone();
        let thread = std::thread::Builder::new().name("vmitap-recording".to_owned());
        // Detached: if its file blocks for ever, it does so without us.
        let started = thread.spawn(move || {
            let _ = end.send(write_all(output, &batches, &counter));
        });
        started.map_err(|error| failed(path, &error, 0))?;
        let real = if path == "-" { "/dev/stdout" } else { path };
        let is_file = std::fs::metadata(real).is_ok_and(|metadata| metadata.is_file());
        let patience = if is_file { DISK_PATIENCE } else { PATIENCE };
        Ok(Self { path: path.to_owned(), format, sender: Some(sender), done, written, patience, accepted: 0, given_up: 0 })
    }

    /// The file's name.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Rows that are in the file.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether every row should be written soon, because somebody may read along.
    pub const fn is_followed(&self) -> bool {
        matches!(self.format, Format::JsonLines)
    }

    /// Hands a batch to the writer.
    pub fn push(&mut self, batch: RecordBatch) -> Pushed {
        let Some(sender) = &self.sender else { return Pushed::Ended(batch) };
        let give_up = Instant::now() + if self.given_up > 0 { Duration::ZERO } else { self.patience };
        let rows = batch.num_rows() as u64;
        let mut batch = batch;
        loop {
            match sender.try_send(batch) {
                Ok(()) => {
                    self.accepted += rows;
                    self.tell_given_up();
                    return Pushed::Taken;
                }
                Err(TrySendError::Full(_)) if Instant::now() >= give_up => {
                    if self.given_up == 0 {
                        log::warn!("{}: the writer is behind, rows are given up", self.path);
                    }
                    self.given_up += rows;
                    return Pushed::GivenUp(rows);
                }
                Err(TrySendError::Full(back)) => {
                    batch = back;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TrySendError::Disconnected(back)) => return Pushed::Ended(back),
            }
        }
    }

    /// Waits for the writer to end the file: the rows in it, and how many were handed over and are not.
    pub fn close(mut self) -> (Result<u64>, u64) {
        self.tell_given_up();
        // Without a sender the writer comes to its end.
        self.sender = None;
        let ended = self.done.recv_timeout(END + self.patience).unwrap_or_else(|error| {
            let (kind, what) = match error {
                RecvTimeoutError::Timeout => (std::io::ErrorKind::TimedOut, "nobody takes what is written"),
                RecvTimeoutError::Disconnected => (std::io::ErrorKind::Other, "the writer has ended in the middle"),
            };
            Err(std::io::Error::new(kind, what))
        });
        let written = self.written();
        (ended.map(|()| written).map_err(|error| failed(&self.path, &error, written)), self.accepted.saturating_sub(written))
    }

    /// Says how many rows were given up, once that is over.
    fn tell_given_up(&mut self) {
        let rows = std::mem::take(&mut self.given_up);
        if rows > 0 {
            log::warn!("{}: {rows} rows were given up", self.path);
        }
    }
}

/// What became of a batch.
pub enum Pushed {
    /// The writer has it.
    Taken,
    /// The writer is behind: so many rows are gone.
    GivenUp(u64),
    /// The writer has ended, which [`Sink::close`] explains. The batch comes back.
    Ended(RecordBatch),
}

fn failed(path: &str, error: &std::io::Error, rows: u64) -> VmiError {
    VmiError::Recording { path: path.to_owned(), errno: error.raw_os_error(), reason: error.to_string(), rows }
}

fn write_all(mut output: Box<dyn Output>, batches: &Receiver<RecordBatch>, written: &AtomicU64) -> std::io::Result<()> {
    let mut result = Ok(());
    while result.is_ok()
        && let Ok(batch) = batches.recv()
    {
        result = output.write(&batch);
        if result.is_ok() {
            written.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        }
    }
    result.and_then(|()| output.finish()).inspect_err(|_| {
        let rows = output.rescue().unwrap_or_else(|also| {
            log::warn!("what was written before could not be ended: {also}");
            0
        });
        written.store(rows, Ordering::Relaxed);
    })
}
