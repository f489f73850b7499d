//! Where the bytes of a dump come from, and checked reads of them: the file is hostile.

use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Result, VmiError};

/// The bytes of a dump.
pub trait Source: Send {
    /// How many there are.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// [`VmiError::Driver`] if they are not there, or cannot be read; the content of `buf` is undefined then.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// What a read of the file is called in errors.
const READING: &str = "reading the dump";

fn past_the_end(offset: u64, len: usize, size: u64) -> VmiError {
    let detail = format!("{len:#x} bytes at offset {offset:#x} reach past the end, which is at {size:#x}");
    VmiError::Driver { op: READING, errno: 0, detail }
}

impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let from = usize::try_from(offset).ok();
        let there = from.and_then(|from| self.get(from..from.checked_add(buf.len())?));
        let there = there.ok_or_else(|| past_the_end(offset, buf.len(), self.size()))?;
        buf.copy_from_slice(there);
        Ok(())
    }
}

/// A file that is read where and when it is needed. Not mapped: one that is cut off beneath us is an error then, and no signal.
pub struct FileSource {
    file: std::fs::File,
    size: u64,
}

impl FileSource {
    /// Opens a regular file. Others (a pipe, a device) could make whoever opens or reads them wait for ever.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let no_file = || std::io::Error::new(ErrorKind::InvalidInput, "it is no regular file");
        if !std::fs::metadata(path)?.is_file() {
            return Err(no_file());
        }
        let file = std::fs::File::open(path)?;
        let about = file.metadata()?;
        if about.is_file() { Ok(Self { size: about.len(), file }) } else { Err(no_file()) }
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => past_the_end(offset, buf.len(), self.file.metadata().map_or(self.size, |now| now.len())),
            _ => VmiError::Driver { op: READING, errno: error.raw_os_error().unwrap_or(0), detail: error.to_string() },
        })
    }
}

/// A dump that is being looked at while it is opened.
#[derive(Clone, Copy)]
pub struct File<'a> {
    /// Its name, for errors.
    pub name: &'a str,
    pub source: &'a dyn Source,
}

impl<'a> File<'a> {
    pub fn error(&self, reason: String) -> VmiError {
        VmiError::Image { what: self.name.to_owned(), reason }
    }

    pub fn check(&self, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(self.error(reason())) }
    }

    /// An error unless the file has `len` bytes at `offset`.
    pub fn check_range(&self, offset: u64, len: u64, what: &str) -> Result<()> {
        let size = self.source.size();
        self.check(offset.checked_add(len).is_some_and(|end| end <= size), || {
            format!("{what}: {len:#x} bytes at offset {offset:#x} reach past the file, which has {size:#x}")
        })
    }

    /// A part of the file. `most` bounds it by what the format needs: `len` is often a number from the file.
    pub fn part(&self, offset: u64, len: u64, most: u64, what: &'static str) -> Result<Part<'a>> {
        self.check(len <= most, || format!("{what}: {len:#x} bytes are more than {most:#x}"))?;
        self.check_range(offset, len, what)?;
        let mut bytes = vec![0; len as usize];
        self.source.read_at(offset, &mut bytes)?;
        Ok(Part { file: *self, what, offset, bytes })
    }
}

/// A part of the file, with numbers in it. All are little-endian.
pub struct Part<'a> {
    file: File<'a>,
    what: &'static str,
    offset: u64,
    pub bytes: Vec<u8>,
}

impl<'a> Part<'a> {
    /// A piece of it, as a part of its own.
    pub fn within(&self, bytes: &[u8], what: &'static str) -> Part<'a> {
        Part { what, bytes: bytes.to_vec(), ..*self }
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let bytes = at.checked_add(N).and_then(|end| self.bytes.get(at..end)?.try_into().ok());
        bytes.ok_or_else(|| {
            let Self { what, offset, bytes, .. } = self;
            self.file.error(format!("{what} at offset {offset:#x}: {} bytes are too few for {N} at {at}", bytes.len()))
        })
    }

    pub fn u16(&self, at: usize) -> Result<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub fn u32(&self, at: usize) -> Result<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub fn u64(&self, at: usize) -> Result<u64> {
        self.array(at).map(u64::from_le_bytes)
    }
}
