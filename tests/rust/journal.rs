//! The journal: what its file says, who may have it, and what is refused.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use vmitap::arch::amd64::ControlRegister;
use vmitap::driver::mock::{CallKind, MockDriver};
use vmitap::driver::{Additions, Monitor, VmiControl, VmiDriver, VmiEvents, VmiFrames, VmiRepair, VmiViews};
use vmitap::event::VmiEvent;
use vmitap::session::journal::{GuestId, Journal, Remains};
use vmitap::session::{Journaled, Limits, Poll, Repaired, Session, TapSpec, Verdict, repair};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View, VmiError};

use crate::session::{CODE, CODE_PA, guest, int3, spec};

/// A folder for journals that goes with the test.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("journals-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    pub fn files(&self) -> usize {
        fs::read_dir(&self.0).map_or(0, Iterator::count)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn guest_id() -> GuestId {
    GuestId::new("test", "1").unwrap()
}

fn mock() -> MockDriver {
    MockDriver::new(1 << 20, 2)
}

fn begin(folder: &Folder, driver: MockDriver) -> Journaled<MockDriver> {
    Journaled::new(Box::new(driver), Journal::begin(&folder.0, &guest_id()).unwrap()).unwrap()
}

fn file(folder: &Folder) -> PathBuf {
    folder.0.join("test-1.journal")
}

/// What the file says to whoever reads it while its session is alive, which holds the lock.
fn read(folder: &Folder) -> Remains {
    let copy = Folder::new(&format!("copy-{:?}", std::thread::current().id()));
    fs::create_dir_all(&copy.0).unwrap();
    fs::copy(file(folder), file(&copy)).unwrap();
    Journal::left(&copy.0, &guest_id()).unwrap().unwrap().remains().clone()
}

/// What the file says once its session is dead.
fn left_behind(folder: &Folder) -> Remains {
    Journal::left(&folder.0, &guest_id()).unwrap().unwrap().remains().clone()
}

fn left(folder: &Folder, text: impl AsRef<[u8]>) -> Result<Remains, VmiError> {
    fs::create_dir_all(&folder.0).unwrap();
    fs::write(file(folder), text).unwrap();
    Journal::left(&folder.0, &guest_id()).map(|journal| journal.unwrap().remains().clone())
}

#[test]
fn the_file_is_its_owners_alone_and_goes_with_a_session_that_undid_everything() {
    let folder = Folder::new("owner");
    let mut driver = begin(&folder, mock());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&file(&folder)), mode(&folder.0)), (0o600, 0o700));
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    driver.destroy_view(view).unwrap();
    drop(driver);
    assert_eq!(folder.files(), 0);
    let mut driver = begin(&folder, mock());
    driver.create_view(MemoryAccess::RWX).unwrap();
    drop(driver);
    assert_eq!(folder.files(), 1, "a view is left");
}

#[test]
fn nothing_is_written_for_a_hit() {
    let folder = Folder::new("hits");
    let (mut driver, context) = guest(2);
    for (hit, va, pa) in (0..1000).map(|n| if n % 2 == 0 { (n, CODE, CODE_PA) } else { (n, Va(CODE.0 + 1), Pa(CODE_PA.0 + 1)) }) {
        driver.push_event(VmiEvent { vcpu: VcpuId(hit % 2), ..int3(View(1), context, va, pa) });
    }
    let mut session = Session::new(Box::new(begin(&folder, driver)), OnWrite::Reapply).unwrap();
    assert_eq!(session.tap_view(), View(1));
    // One whose hits are handed out and step, and one whose hits are counted.
    session.add(&spec(&session, context, CODE)).unwrap();
    session.add(&TapSpec { wanted: false, ..spec(&session, context, Va(CODE.0 + 1)) }).unwrap();
    let written = || {
        let metadata = fs::metadata(file(&folder)).unwrap();
        (metadata.len(), metadata.modified().unwrap(), fs::read(file(&folder)).unwrap())
    };
    let before = written();
    assert!(before.0 > 0);
    while let Poll::Hit(_) = session.poll(&Limits::default()).unwrap() {
        session.answer(Verdict::Continue).unwrap();
    }
    assert_eq!(session.stats().hits, 1000);
    assert_eq!(written(), before);
    session.detach().unwrap();
}

#[test]
fn an_end_that_fails_at_first_keeps_the_journal_until_it_is_whole() {
    let folder = Folder::new("second-try");
    let mut driver = mock();
    driver.fail_nth_of(CallKind::DestroyView, 1);
    let driver: Box<dyn VmiDriver> = Box::new(begin(&folder, driver));
    let mut session = Session::new(driver, OnWrite::Reapply).unwrap();
    let error = session.detach().unwrap_err();
    assert!(matches!(error, VmiError::UndoFailed { .. }), "{error}");
    assert_eq!(read(&folder).views.len(), 1);
    session.detach().unwrap();
    assert_eq!(folder.files(), 0, "the second try was whole");
}

#[test]
fn one_guest_has_one_session_at_a_time() {
    let folder = Folder::new("one");
    let driver = begin(&folder, mock());
    for error in [Journal::begin(&folder.0, &guest_id()).unwrap_err(), Journal::left(&folder.0, &guest_id()).unwrap_err()] {
        assert!(matches!(&error, VmiError::JournalInUse { path } if path.ends_with("test-1.journal")), "{error}");
    }
    let other = Journal::begin(&folder.0, &GuestId::new("test", "2").unwrap());
    other.unwrap().close().unwrap();
    drop(driver);
    assert!(Journal::left(&folder.0, &guest_id()).unwrap().is_none());
}

#[test]
fn what_cannot_be_announced_is_not_done() {
    if std::env::var_os("VMITAP_TEST_SMALL_FILES").is_none() {
        // The limit on the size of files is the whole process's, so this very test is run once more in one of its own.
        let test = std::env::current_exe().unwrap();
        let limited = "trap '' XFSZ; ulimit -f 1; exec \"$0\" --exact journal::what_cannot_be_announced_is_not_done";
        let done = Command::new("sh").args(["-c", limited]).arg(test).env("VMITAP_TEST_SMALL_FILES", "1").output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let folder = Folder::new("full");
    let mut driver = begin(&folder, mock());
    let mut frames = Vec::new();
    let failed = |error: VmiError| assert!(matches!(error, VmiError::Journal { .. }), "{error}");
    loop {
        match driver.allocate_frames(1) {
            Ok(new) => frames.extend(new),
            Err(error) => break failed(error),
        }
        assert!(frames.len() < 1000, "the file has no end");
    }
    let before = driver.additions().unwrap();
    assert_eq!(before.frames, frames);
    failed(driver.monitor(Monitor::ControlRegister(ControlRegister::Cr3), true).unwrap_err());
    assert_eq!(driver.additions().unwrap(), before);
    let mut driver = driver.into_inner();
    assert!(!driver.state().monitors.contains(&Monitor::ControlRegister(ControlRegister::Cr3)));
    repair(&mut *driver, &left_behind(&folder)).unwrap();
    assert_eq!(driver.additions().unwrap(), Additions::default());
}

#[test]
fn guests_are_named_so_that_a_file_can_be() {
    for (driver, id) in
        [("", "1"), ("xen", ""), ("xen", "../1"), ("a/b", "1"), ("xen", "1\n"), ("xen", &"1".repeat(65)), ("xen", "ü")]
    {
        let error = GuestId::new(driver, id).unwrap_err();
        assert!(matches!(error, VmiError::InvalidArgument { what: "guest", .. }), "{error}");
    }
    GuestId::new("xen", "5-6f1c09a2-4f3e-4a37-9a1c-000000000001").unwrap();
}

#[test]
fn a_link_in_the_place_of_the_file_is_not_followed() {
    let folder = Folder::new("link");
    fs::create_dir_all(&folder.0).unwrap();
    let other = folder.0.join("other");
    fs::write(&other, "precious").unwrap();
    symlink(&other, file(&folder)).unwrap();
    for error in [Journal::left(&folder.0, &guest_id()).unwrap_err(), Journal::begin(&folder.0, &guest_id()).unwrap_err()] {
        assert!(matches!(error, VmiError::Journal { .. }), "{error}");
    }
    assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
}

#[test]
fn a_line_that_is_none_is_refused_with_its_number_and_a_torn_last_line_does_not_count() {
    let folder = Folder::new("lines");
    let head = "vmitap journal 1\nguest test 1\nfound running memory=0x100000 views= frames=\n";
    assert_eq!(left(&folder, format!("{head}view?\nview 3\n")).unwrap().views.len(), 1);
    let torn = left(&folder, format!("{head}view?\nview 3")).unwrap();
    assert!(torn.views.is_empty() && !torn.is_empty(), "the view may be there");
    for (text, line) in [
        ("vmitap journal 2\n".to_owned(), 1),
        ("vmitap journal 1\nguest test 2\n".to_owned(), 2),
        (format!("{head}view x\n"), 4),
        (format!("{head}view 1\n\n"), 5),
        (format!("{head}{head}"), 4),
        (format!("{head}frames 0xffffffffffffffff+2\n"), 4),
        (format!("{head}frames 0x0+99999999999\n"), 4),
        (format!("{head}frames 0x0+4194304\nframes 0x0+1\n"), 5),
        (format!("{head}monitor msr 0x100000000\n"), 4),
    ] {
        let error = left(&folder, &text).unwrap_err();
        assert!(matches!(&error, VmiError::Journal { reason, .. } if reason.starts_with(&format!("line {line}:"))), "{error}");
    }
    let error = left(&folder, [0xff, b'\n']).unwrap_err();
    assert!(matches!(error, VmiError::Journal { .. }), "{error}");
}

/// One change of a guest, chosen by a number.
fn change(driver: &mut Journaled<MockDriver>, which: u8, n: u8) {
    let there = driver.additions().unwrap();
    let monitors = [Monitor::Cpuid, Monitor::Msr(n.into()), Monitor::ControlRegister(ControlRegister::Cr3), Monitor::Breakpoint];
    let monitor = monitors[usize::from(n) % monitors.len()];
    // What the driver refuses changes nothing, and the journal must say so.
    let _ = match which % 8 {
        0 => driver.create_view(MemoryAccess::RWX).map(drop),
        1 => driver.destroy_view(View(u16::from(n % 8))),
        2 | 3 => driver.allocate_frames(usize::from(n % 20)).map(drop),
        4 => {
            let some: Vec<Gfn> = there.frames.iter().copied().skip(usize::from(n % 5)).step_by(3).collect();
            driver.free_frames(&some)
        }
        5 => driver.monitor(monitor, !n.is_multiple_of(3)),
        6 => driver.pause(),
        _ => driver.resume(),
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_file_says_what_is_in_the_guest_at_any_time(changes in prop::collection::vec(any::<(u8, u8)>(), 0..80), foreign in 0usize..3) {
        let folder = Folder::new(&format!("model-{:?}", std::thread::current().id()));
        let mut guest = mock();
        for _ in 0..foreign {
            guest.create_view(MemoryAccess::RWX).unwrap();
        }
        guest.allocate_frames(foreign).unwrap();
        let before = guest.additions().unwrap();
        let mut driver = begin(&folder, guest);
        for (which, n) in changes {
            change(&mut driver, which, n);
        }
        let remains = read(&folder);
        prop_assert_eq!(&remains, driver.journal().remains());
        let there = driver.additions().unwrap();
        // A view or frame that was there before and is gone now was the session's to remove, and nothing to undo.
        let new = |all: usize, found: usize| all.saturating_sub(found);
        prop_assert!(remains.views.len() >= new(there.views.len(), before.views.len()));
        prop_assert!(remains.views.iter().all(|view| there.views.contains(view)));
        prop_assert!(remains.frames.iter().all(|frame| there.frames.contains(frame)));
        let repaired = repair(&mut driver, &remains).unwrap();
        prop_assert_eq!(repaired.frames, remains.frames.len());
        let after = driver.additions().unwrap();
        prop_assert!(after.views.iter().all(|view| before.views.contains(view)));
        prop_assert!(after.frames.iter().all(|frame| before.frames.contains(frame)));
        prop_assert_eq!(after.is_paused, before.is_paused);
    }

    #[test]
    fn no_file_makes_the_reader_panic(lines in prop::collection::vec("(view|view-|frames|frames-|monitor|monitor-|found running|found|pause|nothing|resume)?[ ?-]?[0-9a-fx+,=msr ]{0,12}\n?", 0..20), head: bool) {
        let folder = Folder::new(&format!("hostile-{:?}", std::thread::current().id()));
        let head = if head { "vmitap journal 1\nguest test 1\n" } else { "" };
        match left(&folder, format!("{head}{}", lines.concat())) {
            Ok(remains) => prop_assert!(remains.frames.len() <= 20 << 24),
            Err(error) => prop_assert!(matches!(error, VmiError::Journal { .. }), "{}", error),
        }
    }
}

#[test]
fn a_long_session_keeps_a_short_file() {
    let folder = Folder::new("long");
    let mut driver = begin(&folder, mock());
    let kept = driver.allocate_frames(5).unwrap();
    for _ in 0..30_000 {
        let frames = driver.allocate_frames(2).unwrap();
        driver.free_frames(&frames).unwrap();
    }
    let len = fs::metadata(file(&folder)).unwrap().len();
    assert!(len < 2 << 20, "{len} bytes");
    assert!(matches!(Journal::left(&folder.0, &guest_id()), Err(VmiError::JournalInUse { .. })), "the new file is locked too");
    assert_eq!(read(&folder).frames.into_iter().collect::<Vec<_>>(), kept);
}

#[test]
fn a_repair_that_fails_half_way_can_be_tried_again() {
    for kind in [CallKind::DestroyView, CallKind::FreeFrames, CallKind::Resume, CallKind::ReleaseHeld, CallKind::Monitor] {
        let folder = Folder::new("again");
        let mut driver = mock();
        let before = driver.snapshot();
        let mut journaled = begin(&folder, driver);
        journaled.create_view(MemoryAccess::RWX).unwrap();
        journaled.allocate_frames(3).unwrap();
        journaled.monitor(Monitor::Breakpoint, true).unwrap();
        journaled.pause().unwrap();
        let remains = journaled.journal().remains().clone();
        driver = *journaled.into_inner();
        driver.fail_nth_of(kind, 1);
        let error = repair(&mut driver, &remains).unwrap_err();
        assert!(matches!(error, VmiError::UndoFailed { .. }), "{kind:?}: {error}");
        assert_eq!(driver.faults_left(), 0);
        repair(&mut driver, &remains).unwrap();
        assert_eq!(driver.snapshot().differences(&before), [] as [String; 0], "{kind:?}");
        assert_eq!(repair(&mut driver, &remains).unwrap(), Repaired::default(), "{kind:?}: nothing is left");
    }
}
