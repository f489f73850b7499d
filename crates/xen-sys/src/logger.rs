//! The text that Xen's libraries would write to stderr, brought to a function of the caller's.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::types::ToolLog;

/// How much a line matters (xentoollog.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Of interest only when looking for an error.
    Debug,
    /// Of interest.
    Info,
    /// Something may be wrong.
    Warn,
    /// Something is wrong.
    Error,
}

/// Takes a line of a library's text.
pub type Sink = fn(Level, &str);

/// Bytes of a line that are kept.
const LINE: usize = 512;

unsafe extern "C" {
    // SAFETY: C's own; `va_list` is passed as the pointer that it is in the calling conventions this crate builds for.
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// A logger whose address the libraries keep.
#[repr(C)]
pub(crate) struct Logger {
    table: ToolLog,
    sink: Sink,
}

impl Logger {
    #[expect(clippy::unnecessary_box_returns, reason = "the libraries keep its address")]
    pub fn new(sink: Sink) -> Box<Self> {
        Box::new(Self { table: ToolLog { vmessage: Some(vmessage), progress: None, destroy: Some(destroy) }, sink })
    }

    pub fn as_ptr(&self) -> *mut ToolLog {
        (&raw const *self).cast_mut().cast()
    }
}

fn text<'a>(pointer: *const c_char) -> std::borrow::Cow<'a, str> {
    if pointer.is_null() {
        return std::borrow::Cow::Borrowed("");
    }
    // SAFETY: not null, and the libraries hand over NUL-terminated strings that live as long as the call.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy()
}

unsafe extern "C" fn vmessage(
    logger: *mut ToolLog,
    level: c_int,
    errnoval: c_int,
    context: *const c_char,
    format: *const c_char,
    arguments: *mut c_void,
) {
    let mut line: [c_char; LINE] = [0; LINE];
    // SAFETY: the buffer is as long as it is said to be; format and arguments are the caller's own and fit each other.
    let written = unsafe { vsnprintf(line.as_mut_ptr(), LINE, format, arguments) };
    if written < 0 {
        return;
    }
    let level = match level {
        ..=4 => Level::Debug,
        5 | 6 => Level::Info,
        7 => Level::Warn,
        _ => Level::Error,
    };
    let message = text(line.as_ptr());
    let (message, context) = (message.trim_end(), text(context));
    let reason = if errnoval > 0 { format!(": {}", std::io::Error::from_raw_os_error(errnoval)) } else { String::new() };
    // SAFETY: `logger` is the address `Logger::as_ptr` gave, whose first field is the table; it outlives every library handle.
    let sink = unsafe { (*logger.cast::<Logger>()).sink };
    sink(level, &if context.is_empty() { format!("{message}{reason}") } else { format!("{context}: {message}{reason}") });
}

/// The logger is ours and outlives its users: nothing to do.
unsafe extern "C" fn destroy(_: *mut ToolLog) {}
