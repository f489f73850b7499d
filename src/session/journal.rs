//! The journal: a small file a guest that says what a session has added to it, so that it can be undone if the session is killed.
//!
//! Each line is written before the change it announces or right after the change it reports, so that at any moment the file tells
//! everything that may be in the guest. A line reaches the kernel with one `write` and outlives the process; it is not forced to
//! the disk, because what ends the machine ends its guests too. Nothing is written for a hit.
//!
//! The file is text, for the person who has to look into it. While its session lives it is locked; a file that is there and not
//! locked was left by a session that ended without a word.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::addr::{Gfn, View};
use crate::arch::amd64::ControlRegister;
use crate::driver::{Additions, Monitor};
use crate::error::{Result, VmiError};

/// First line of the file; the number is that of the format.
const TITLE: &str = "vmitap journal 1";
/// A file is written anew, without what is undone, once it has grown to this many bytes.
const ROOM: u64 = 1 << 20;
/// No file that this module writes is longer; one that is was not written by it.
const LONGEST: u64 = 64 << 20;
/// No file names more frames in all its lines together: what is read from a file must take bounded time and memory.
const MOST_FRAMES: u64 = 1 << 22;
/// `O_NOFOLLOW`: a link in the place of the file is not followed. The value is that of Linux on x86-64 and most others.
const NO_FOLLOW: i32 = 0o400_000;
/// Names the folder of the journals where [`folder`]'s choice does not fit.
pub const FOLDER_VARIABLE: &str = "VMITAP_STATE";

/// Where journals are kept: what [`FOLDER_VARIABLE`] says, else `/run/vmitap`, which is empty after a start of the machine.
pub fn folder() -> PathBuf {
    std::env::var_os(FOLDER_VARIABLE).filter(|path| !path.is_empty()).map_or_else(|| PathBuf::from("/run/vmitap"), PathBuf::from)
}

/// A guest, for good: no other guest ever has the same, also not after this one is gone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestId {
    driver: String,
    id: String,
}

impl GuestId {
    /// # Errors
    /// [`VmiError::InvalidArgument`] unless both are of 1 to 64 ASCII letters, digits and hyphens: they name a file.
    pub fn new(driver: &str, id: &str) -> Result<Self> {
        let fits = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if fits(driver) && fits(id) {
            return Ok(Self { driver: driver.to_owned(), id: id.to_owned() });
        }
        let reason = format!("{driver:?} and {id:?} are not both of 1 to 64 letters, digits and hyphens");
        Err(VmiError::InvalidArgument { what: "guest", reason })
    }

    fn path_in(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-{}.journal", self.driver, self.id))
    }
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.driver, self.id)
    }
}

/// One line of a journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    ViewWanted,
    View(View),
    ViewGone(View),
    FramesWanted,
    Frames(Vec<Gfn>),
    FramesGone(Vec<Gfn>),
    Monitor(Monitor),
    MonitorGone(Monitor),
    PauseWanted,
    Pause,
    ResumeWanted,
    Resume,
    /// What was wanted failed, with nothing changed.
    Nothing,
    /// The most frames there were at once, where the lines that say so are gone.
    Peak(usize),
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ViewWanted => f.write_str("view?"),
            Self::View(view) => write!(f, "view {}", view.0),
            Self::ViewGone(view) => write!(f, "view- {}", view.0),
            Self::FramesWanted => f.write_str("frames?"),
            Self::Frames(frames) => write!(f, "frames {}", runs_of(frames)),
            Self::FramesGone(frames) => write!(f, "frames- {}", runs_of(frames)),
            Self::Monitor(monitor) => write!(f, "monitor {monitor}"),
            Self::MonitorGone(monitor) => write!(f, "monitor- {monitor}"),
            Self::PauseWanted => f.write_str("pause?"),
            Self::Pause => f.write_str("pause"),
            Self::ResumeWanted => f.write_str("resume?"),
            Self::Resume => f.write_str("resume"),
            Self::Nothing => f.write_str("nothing"),
            Self::Peak(frames) => write!(f, "peak {frames}"),
        }
    }
}

impl Entry {
    /// How many frames it names.
    const fn frames(&self) -> usize {
        match self {
            Self::Frames(frames) | Self::FramesGone(frames) => frames.len(),
            _ => 0,
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let view = || rest.parse().ok().map(View);
        Some(match word {
            "view?" => Self::ViewWanted,
            "view" => Self::View(view()?),
            "view-" => Self::ViewGone(view()?),
            "frames?" => Self::FramesWanted,
            "frames" => Self::Frames(frames_of(rest)?),
            "frames-" => Self::FramesGone(frames_of(rest)?),
            "monitor" => Self::Monitor(monitor_of(rest)?),
            "monitor-" => Self::MonitorGone(monitor_of(rest)?),
            "pause?" => Self::PauseWanted,
            "pause" => Self::Pause,
            "resume?" => Self::ResumeWanted,
            "resume" => Self::Resume,
            "nothing" => Self::Nothing,
            "peak" => Self::Peak(rest.parse().ok()?),
            _ => return None,
        })
    }
}

/// Frames as runs of neighbours: `0x100+16,0x200+1`.
fn runs_of(frames: &[Gfn]) -> String {
    let runs = frames.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0));
    let runs: Vec<String> = runs.filter_map(|run| Some(format!("{:#x}+{}", run.first()?.0, run.len()))).collect();
    runs.join(",")
}

/// The frames of [`runs_of`]; `None` if it is no such list, or names more frames than any session has.
fn frames_of(text: &str) -> Option<Vec<Gfn>> {
    let mut frames = Vec::new();
    for run in text.split(',').filter(|run| !run.is_empty()) {
        let (first, count) = run.split_once('+')?;
        let (first, count): (u64, u64) = (hex(first)?, count.parse().ok()?);
        let end = first.checked_add(count)?;
        if frames.len() as u64 + count > MOST_FRAMES {
            return None;
        }
        frames.extend((first..end).map(Gfn));
    }
    Some(frames)
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn monitor_of(name: &str) -> Option<Monitor> {
    Some(match name {
        "int3" => Monitor::Breakpoint,
        "cpuid" => Monitor::Cpuid,
        "descriptors" => Monitor::DescriptorAccess,
        "debug" => Monitor::Debug,
        "ports" => Monitor::PortIo,
        "requests" => Monitor::GuestRequest,
        "cr0" => Monitor::ControlRegister(ControlRegister::Cr0),
        "cr3" => Monitor::ControlRegister(ControlRegister::Cr3),
        "cr4" => Monitor::ControlRegister(ControlRegister::Cr4),
        _ => Monitor::Msr(u32::try_from(hex(name.strip_prefix("msr ")?)?).ok()?),
    })
}

/// What a session has added to its guest, as its journal tells it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Remains {
    /// What was there before; `None` if the session did not get as far as looking.
    pub found: Option<Found>,
    /// Its views.
    pub views: BTreeSet<View>,
    /// Its frames.
    pub frames: BTreeSet<Gfn>,
    /// What it has monitored.
    pub monitors: Vec<Monitor>,
    /// How often it holds the guest.
    pub pauses: u32,
    /// The most frames it had at once.
    pub most_frames: usize,
    /// A change was under way, and may or may not have been made.
    wanted: Option<Wanted>,
}

/// A guest as a session finds it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// What had been added to it already.
    pub additions: Additions,
    /// Bytes of its address space.
    pub memory_size: u64,
}

/// A change whose outcome is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    View,
    Frames,
    Pause,
    Resume,
}

impl Remains {
    /// Reads what a journal says. A last line without its end was being written when the session ended, and does not count.
    ///
    /// # Errors
    /// The number of the line that is none of a journal's, and why.
    pub fn parse(text: &str, guest: &GuestId) -> std::result::Result<Self, (usize, String)> {
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        let mut remains = Self::default();
        let mut named = 0;
        for (index, line) in whole.split('\n').enumerate() {
            let wrong = |expected: &str| Err((index + 1, format!("{} is written where {expected} should be", shown(line))));
            match index {
                // A session that was killed while it made the file has not touched the guest.
                _ if whole.is_empty() => {}
                0 if line != TITLE => return wrong(TITLE),
                1 if line != format!("guest {guest}") => return wrong(&format!("\"guest {guest}\"")),
                0 | 1 => {}
                _ => match Entry::parse(line) {
                    Some(entry) => {
                        named += entry.frames() as u64;
                        if named > MOST_FRAMES {
                            return wrong("no more frames than a session can have");
                        }
                        remains.note(entry);
                    }
                    None if line.starts_with("found ") && remains.found.is_none() => {
                        remains.found = parse_found(line);
                        if remains.found.is_none() {
                            return wrong("what was in the guest before");
                        }
                    }
                    None => return wrong("a change of the guest"),
                },
            }
        }
        Ok(remains)
    }

    /// Whether nothing is left in the guest, as far as its session made it.
    pub fn is_empty(&self) -> bool {
        let Self { found: _, most_frames: _, views, frames, monitors, pauses, wanted } = self;
        views.is_empty() && frames.is_empty() && monitors.is_empty() && *pauses == 0 && wanted.is_none()
    }

    pub(super) const fn wanted(&self) -> Option<Wanted> {
        self.wanted
    }

    fn note(&mut self, entry: Entry) {
        self.wanted = None;
        match entry {
            Entry::ViewWanted => self.wanted = Some(Wanted::View),
            Entry::FramesWanted => self.wanted = Some(Wanted::Frames),
            Entry::PauseWanted => self.wanted = Some(Wanted::Pause),
            Entry::ResumeWanted => self.wanted = Some(Wanted::Resume),
            Entry::View(view) => drop(self.views.insert(view)),
            Entry::ViewGone(view) => drop(self.views.remove(&view)),
            Entry::Frames(frames) => {
                self.frames.extend(frames);
                self.most_frames = self.most_frames.max(self.frames.len());
            }
            Entry::Peak(frames) => self.most_frames = self.most_frames.max(frames),
            Entry::FramesGone(gone) => gone.iter().for_each(|frame| {
                self.frames.remove(frame);
            }),
            Entry::Monitor(monitor) if self.monitors.contains(&monitor) => {}
            Entry::Monitor(monitor) => self.monitors.push(monitor),
            Entry::MonitorGone(monitor) => self.monitors.retain(|known| *known != monitor),
            Entry::Pause => self.pauses += 1,
            Entry::Resume => self.pauses = self.pauses.saturating_sub(1),
            Entry::Nothing => {}
        }
    }

    /// The lines that lead to this.
    fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.views.iter().copied().map(Entry::View).collect();
        if self.most_frames > self.frames.len() {
            entries.push(Entry::Peak(self.most_frames));
        }
        if !self.frames.is_empty() {
            entries.push(Entry::Frames(self.frames.iter().copied().collect()));
        }
        entries.extend(self.monitors.iter().copied().map(Entry::Monitor));
        entries.extend((0..self.pauses).map(|_| Entry::Pause));
        entries.extend(self.wanted.map(|wanted| match wanted {
            Wanted::View => Entry::ViewWanted,
            Wanted::Frames => Entry::FramesWanted,
            Wanted::Pause => Entry::PauseWanted,
            Wanted::Resume => Entry::ResumeWanted,
        }));
        entries
    }
}

/// The line that says what was in the guest before.
fn found_line(found: &Found) -> String {
    let Found { additions: Additions { views, frames, is_paused }, memory_size } = found;
    let views: Vec<String> = views.iter().map(|view| view.0.to_string()).collect();
    let state = if *is_paused { "paused" } else { "running" };
    format!("found {state} memory={memory_size:#x} views={} frames={}", views.join(","), runs_of(frames))
}

fn parse_found(line: &str) -> Option<Found> {
    let mut words = line.strip_prefix("found ")?.split(' ');
    let is_paused = match words.next()? {
        "paused" => true,
        "running" => false,
        _ => return None,
    };
    let memory_size = hex(words.next()?.strip_prefix("memory=")?)?;
    let (views, frames) = (words.next()?.strip_prefix("views=")?, words.next()?.strip_prefix("frames=")?);
    let numbers = views.split(',').filter(|view| !view.is_empty());
    let views = numbers.map(|view| view.parse().ok().map(View)).collect::<Option<_>>()?;
    let additions = Additions { views, frames: frames_of(frames)?, is_paused };
    words.next().is_none().then_some(Found { additions, memory_size })
}

/// A line for an error message: whatever is in the file, it stays one short line.
fn shown(line: &str) -> String {
    let short: String = line.chars().take(40).collect();
    format!("{short:?}")
}

/// The journal of one session, locked as long as this lives.
#[derive(Debug)]
pub struct Journal {
    guest: GuestId,
    path: PathBuf,
    file: Locked,
    len: u64,
    /// Frames named in all lines together.
    named: u64,
    remains: Remains,
}

impl Journal {
    /// Begins the journal of a session. To be called before the guest is touched.
    ///
    /// # Errors
    /// [`VmiError::JournalInUse`] if a session with this guest is alive; [`VmiError::JournalLeft`] if one ended without a word;
    /// [`VmiError::Journal`] if the file cannot be made.
    pub fn begin(folder: &Path, guest: &GuestId) -> Result<Self> {
        match Self::left(folder, guest)? {
            None => {}
            // That session ended before it wrote a line, and so before it touched the guest.
            Some(left) if left.len == 0 => left.close()?,
            Some(left) => {
                let path = left.path.display().to_string();
                return Err(VmiError::JournalLeft { path });
            }
        }
        let path = guest.path_in(folder);
        let failed = |error: io::Error| failure(&path, &error);
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let mut options = OpenOptions::new();
        let file = options.append(true).create_new(true).mode(0o600).custom_flags(NO_FOLLOW).open(&path).map_err(failed)?;
        let file = Locked::new(file, &path)?;
        let mut journal = Self { guest: guest.clone(), path, file, len: 0, named: 0, remains: Remains::default() };
        journal.append(&format!("{TITLE}\nguest {guest}\n"))?;
        Ok(journal)
    }

    /// The journal that a session with this guest has left which ended without a word; `None` if there is none.
    ///
    /// # Errors
    /// [`VmiError::JournalInUse`] if the session is alive; [`VmiError::Journal`] if the file cannot be read or is none.
    pub fn left(folder: &Path, guest: &GuestId) -> Result<Option<Self>> {
        let path = guest.path_in(folder);
        let failed = |error: io::Error| failure(&path, &error);
        loop {
            let mut options = OpenOptions::new();
            let file = match options.read(true).append(true).custom_flags(NO_FOLLOW).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            let file = Locked::new(file, &path)?;
            // The file may have been replaced or removed between the two: then the lock is on nothing.
            let ours = file.0.metadata().map_err(failed)?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(failed(error)),
            }
            let refuse = |reason: String| VmiError::Journal { path: path.display().to_string(), reason };
            if !ours.is_file() || ours.len() > LONGEST {
                return Err(refuse(format!("a journal is a file of at most {LONGEST} bytes")));
            }
            let mut text = Vec::new();
            (&file.0).take(LONGEST).read_to_end(&mut text).map_err(failed)?;
            let text = String::from_utf8(text).map_err(|error| refuse(error.to_string()))?;
            let remains = Remains::parse(&text, guest).map_err(|(line, why)| refuse(format!("line {line}: {why}")))?;
            return Ok(Some(Self { guest: guest.clone(), path, file, len: text.len() as u64, named: MOST_FRAMES, remains }));
        }
    }

    /// What the session has in the guest.
    pub const fn remains(&self) -> &Remains {
        &self.remains
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes down what is in the guest before anything is added.
    pub(super) fn found(&mut self, found: Found) -> Result<()> {
        self.append(&format!("{}\n", found_line(&found)))?;
        self.remains.found = Some(found);
        Ok(())
    }

    /// Writes one line.
    pub(super) fn note(&mut self, entry: Entry) -> Result<()> {
        self.append(&format!("{entry}\n"))?;
        self.named += entry.frames() as u64;
        self.remains.note(entry);
        let is_long = self.len > ROOM || self.named > MOST_FRAMES / 2;
        if is_long && self.named >= 2 * self.remains.frames.len() as u64 { self.rewrite() } else { Ok(()) }
    }

    fn append(&mut self, line: &str) -> Result<()> {
        if let Err(error) = self.file.0.write_all(line.as_bytes()) {
            // Half a line would spoil the next one.
            let cut = self.file.0.set_len(self.len);
            let error = cut.err().unwrap_or(error);
            return Err(failure(&self.path, &error));
        }
        self.len += line.len() as u64;
        Ok(())
    }

    /// Writes the file anew with what still counts, and puts it in the old one's place in one step.
    fn rewrite(&mut self) -> Result<()> {
        let path = self.path.with_extension("new");
        let failed = |error: io::Error| failure(&path, &error);
        let mut lines = vec![TITLE.to_owned(), format!("guest {}", self.guest)];
        lines.extend(self.remains.found.as_ref().map(found_line));
        lines.extend(self.remains.entries().iter().map(Entry::to_string));
        let text = lines.join("\n") + "\n";
        let mut options = OpenOptions::new();
        let options = options.append(true).create(true).mode(0o600).custom_flags(NO_FOLLOW);
        let mut file = Locked::new(options.open(&path).map_err(failed)?, &path)?;
        file.0.set_len(0).and_then(|()| file.0.write_all(text.as_bytes())).map_err(failed)?;
        fs::rename(&path, &self.path).map_err(failed)?;
        self.file = file;
        self.len = text.len() as u64;
        self.named = self.remains.frames.len() as u64;
        Ok(())
    }

    /// Removes the file: nothing of the session is left in the guest.
    ///
    /// # Errors
    /// [`VmiError::Journal`] if it cannot be removed.
    pub fn close(&self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|error| failure(&self.path, &error))
    }
}

fn failure(path: &Path, error: &io::Error) -> VmiError {
    VmiError::Journal { path: path.display().to_string(), reason: error.to_string() }
}

/// A file that nobody else has locked. The lock is given back before the file is closed: a process that was just forked has the file open
/// too, until it executes its program, and would keep the lock for that long.
#[derive(Debug)]
struct Locked(File);

impl Locked {
    fn new(file: File, path: &Path) -> Result<Self> {
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => Err(VmiError::JournalInUse { path: path.display().to_string() }),
            Err(TryLockError::Error(error)) => Err(failure(path, &error)),
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            log::debug!("a journal stays locked until it is closed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_was_just_forked_does_not_keep_a_session_alive_that_has_ended() {
        let folder = std::env::temp_dir().join(format!("vmitap-forked-{}", std::process::id()));
        let guest = GuestId::new("test", "forked").unwrap();
        let journal = Journal::begin(&folder, &guest).unwrap();
        // What a fork leaves in the child until it executes its program.
        let childs = journal.file.0.try_clone().unwrap();
        assert!(matches!(Journal::left(&folder, &guest), Err(VmiError::JournalInUse { .. })));
        drop(journal);
        let left = Journal::left(&folder, &guest).unwrap().unwrap();
        left.close().unwrap();
        fs::remove_dir(&folder).unwrap();
        drop(childs);
    }
}
