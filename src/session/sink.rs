//! A file that closed batches go to while the guest runs, written by a thread of its own so that no vCPU waits for a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
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
    /// The writer was behind for too long; batches are given up until it has caught up.
    is_stalled: bool,
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
        Ok(Self { path: path.to_owned(), format, sender: Some(sender), done, written, patience, is_stalled: false })
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

    /// Hands a batch to the writer; how many rows were given up because it is behind.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if writing failed.
    pub fn push(&mut self, batch: RecordBatch) -> Result<u64> {
        let Some(sender) = &self.sender else { return Ok(0) };
        let give_up = Instant::now() + if self.is_stalled { Duration::ZERO } else { self.patience };
        let mut batch = batch;
        loop {
            match sender.try_send(batch) {
                Ok(()) => {
                    self.is_stalled = false;
                    return Ok(0);
                }
                Err(TrySendError::Full(back)) if Instant::now() >= give_up => {
                    if !std::mem::replace(&mut self.is_stalled, true) {
                        log::warn!("{}: the writer is behind, rows are given up", self.path);
                    }
                    return Ok(back.num_rows() as u64);
                }
                Err(TrySendError::Full(back)) => {
                    batch = back;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TrySendError::Disconnected(_)) => return self.end().map(|()| 0),
            }
        }
    }

    /// Waits for the writer to end the file; the rows in it.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if writing failed, or if nobody takes what is written.
    pub fn close(mut self) -> Result<u64> {
        self.end()?;
        Ok(self.written())
    }

    fn end(&mut self) -> Result<()> {
        if self.sender.take().is_none() {
            return Ok(());
        }
        let stopped = || std::io::Error::new(std::io::ErrorKind::TimedOut, "nobody takes what is written");
        let ended = self.done.recv_timeout(END + self.patience).unwrap_or_else(|_| Err(stopped()));
        ended.map_err(|error| failed(&self.path, &error, self.written()))
    }
}

fn failed(path: &str, error: &std::io::Error, rows: u64) -> VmiError {
    VmiError::Recording { path: path.to_owned(), errno: error.raw_os_error(), reason: error.to_string(), rows }
}

fn write_all(mut output: Box<dyn Output>, batches: &Receiver<RecordBatch>, written: &AtomicU64) -> std::io::Result<()> {
    while let Ok(batch) = batches.recv() {
        if let Err(error) = output.write(&batch) {
            match output.rescue() {
                Ok(rows) => written.store(rows, Ordering::Relaxed),
                Err(also) => log::warn!("what was written before could not be ended: {also}"),
            }
            return Err(error);
        }
        written.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
    }
    output.finish()
}
