//! What the crate logs, by thread.

use std::cell::RefCell;

thread_local! {
    /// Lines of warnings and errors that this thread has logged.
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// What this thread logs from here on is kept.
pub fn listen() {
    static LOGGER: Lines = Lines;
    // The process has one logger; the first test that listens makes it.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    LINES.with_borrow_mut(Vec::clear);
}

/// Warnings and errors that this thread has logged since it listens.
pub fn logged() -> Vec<String> {
    LINES.with_borrow(Vec::clone)
}
