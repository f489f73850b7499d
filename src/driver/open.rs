//! Opens a guest by what the user calls it. The one place outside tests that names a concrete driver.

use std::path::{Path, PathBuf};

use crate::driver::VmiDriver;
use crate::driver::emu::{BootOptions, EmuDriver};
use crate::error::{Result, VmiError};
use crate::image::Image;
use crate::symbols::SymbolTable;

#[cfg(feature = "xen")]
pub use super::xen::{DomainSummary, host as xen_host};

/// Names the engine's library where the options do not.
pub const LIBRARY_VARIABLE: &str = "VMITAP_LIBUNICORN";

/// The guest that comes with vmitap (guests/demo).
pub(super) const DEMO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"));

const FORMS: &str = "write \"demo\" for the guest that comes with vmitap, \"emu:PATH\" for an ELF image of your own, \"xen:NAME\" for a Xen domain, or \"dump:PATH\" for a memory dump";

/// Which guest.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// The guest that comes with vmitap, on the embedded driver.
    Demo,
    /// The ELF image at this path, on the embedded driver.
    Emu(PathBuf),
    /// The Xen domain of this name or number.
    Xen(String),
    /// The memory dump at this path, for reading only.
    Dump(PathBuf),
}

impl Target {
    /// Reads `"demo"`, `"emu:PATH"`, `"xen:NAME"`, `"xen:NUMBER"` or `"dump:PATH"`.
    ///
    /// # Errors
    /// [`VmiError::Attach`], whose hint names the forms.
    pub fn parse(target: &str) -> Result<Self> {
        let refuse = |reason: &str| Err(attach(target, reason.to_owned(), FORMS.to_owned()));
        match target.split_once(':') {
            None if target == "demo" => Ok(Self::Demo),
            Some(("emu", "")) => refuse("\"emu:\" is followed by no path"),
            Some(("emu", path)) => Ok(Self::Emu(PathBuf::from(path))),
            Some(("xen", "")) => refuse("\"xen:\" is followed by neither a name nor a number"),
            Some(("xen", which)) => Ok(Self::Xen(which.to_owned())),
            Some(("dump", "")) => refuse("\"dump:\" is followed by no path"),
            Some(("dump", path)) => Ok(Self::Dump(PathBuf::from(path))),
            _ => refuse("this is no kind of guest that vmitap knows"),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Demo => f.write_str("demo"),
            Self::Emu(path) => write!(f, "emu:{}", path.display()),
            Self::Xen(which) => write!(f, "xen:{which}"),
            Self::Dump(path) => write!(f, "dump:{}", path.display()),
        }
    }
}

/// How a guest is started; what is `None` is the driver's default.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OpenOptions {
    /// Bytes of RAM, in whole pages; 64 MiB if not given.
    pub memory: Option<u64>,
    /// How many vCPUs, 1 to 8; 1 if not given.
    pub vcpus: Option<u16>,
    /// What the guest finds as its command line.
    pub command_line: String,
    /// The engine's library; the environment's [`LIBRARY_VARIABLE`] if not given.
    pub libunicorn: Option<PathBuf>,
    /// A Xen domain's listener loses its place: right only if it has died. False if not given.
    pub take_over: bool,
}

/// A guest that is ready to be tapped. One on the embedded driver has not run yet.
pub struct Opened {
    /// The guest.
    pub driver: Box<dyn VmiDriver>,
    /// The symbols of its image; empty if it is stripped.
    pub symbols: SymbolTable,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("info", self.driver.info()).field("symbols", &self.symbols.len()).finish()
    }
}

/// Boots the guest, or attaches to it. Nothing of a guest on the embedded driver runs until the first
/// [`crate::driver::VmiEvents::wait`]; a Xen domain goes on running; nothing of a dump ever does.
///
/// # Errors
/// [`VmiError::Attach`] if the file, the engine's library or the domain cannot be used, [`VmiError::Image`] if the file is no such
/// guest or no dump, [`VmiError::InvalidArgument`] for options out of range or that the target does not have. Nothing is left behind.
pub fn open(target: &Target, options: &OpenOptions) -> Result<Opened> {
    match target {
        Target::Demo => start(target, "demo", DEMO, options),
        Target::Emu(path) => {
            let bytes = read(target, path)?;
            start(target, &path.display().to_string(), &bytes, options)
        }
        Target::Xen(which) => attach_xen(which, options),
        Target::Dump(path) => open_dump(path, options),
    }
}

/// Who the guest is, for good, and which driver has it: a name of letters, digits and hyphens that no other guest ever has. `None`
/// for one that lives in its driver and ends with it, and for a dump, in which nothing can be left.
///
/// # Errors
/// [`VmiError::Attach`] if there is no such guest.
pub fn identity(target: &Target) -> Result<Option<(&'static str, String)>> {
    match target {
        Target::Demo | Target::Emu(_) | Target::Dump(_) => Ok(None),
        #[cfg(feature = "xen")]
        Target::Xen(which) => super::xen::identity(which, None).map(|id| Some(("xen", id))),
        #[cfg(not(feature = "xen"))]
        Target::Xen(which) => Err(no_xen(which)),
    }
}

#[cfg(feature = "xen")]
fn attach_xen(which: &str, options: &OpenOptions) -> Result<Opened> {
    refuse_boot_options(options, "a Xen domain has what its own configuration says")?;
    let xen = super::xen::XenOptions::from_environment()?;
    let xen = super::xen::XenOptions { take_over: options.take_over, ..xen };
    let driver = super::xen::XenDriver::attach(which, &xen)?;
    Ok(Opened { driver: Box::new(driver), symbols: SymbolTable::default() })
}

/// An error if an option says how a guest is made: this one is.
#[cfg(any(feature = "xen", feature = "dump"))]
fn refuse_boot_options(options: &OpenOptions, reason: &str) -> Result<()> {
    let given =
        [("memory", options.memory.is_some()), ("vcpus", options.vcpus.is_some()), ("cmdline", !options.command_line.is_empty())];
    let given = given.into_iter().find_map(|(what, is_given)| is_given.then_some(what));
    given.map_or(Ok(()), |what| Err(VmiError::InvalidArgument { what, reason: reason.to_owned() }))
}

#[cfg(feature = "dump")]
fn open_dump(path: &Path, options: &OpenOptions) -> Result<Opened> {
    refuse_boot_options(options, "a dump has what its guest had")?;
    Ok(Opened { driver: Box::new(super::dump::DumpDriver::open(path)?), symbols: SymbolTable::default() })
}

#[cfg(not(feature = "dump"))]
fn open_dump(path: &Path, _: &OpenOptions) -> Result<Opened> {
    let reason = "this build has no driver for dumps".to_owned();
    Err(attach(&format!("dump:{}", path.display()), reason, "build it with the feature dump".to_owned()))
}

#[cfg(not(feature = "xen"))]
fn attach_xen(which: &str, _: &OpenOptions) -> Result<Opened> {
    Err(no_xen(which))
}

#[cfg(not(feature = "xen"))]
fn no_xen(which: &str) -> VmiError {
    attach(&format!("xen:{which}"), "this build has no Xen driver".to_owned(), "build it with the feature xen".to_owned())
}

/// Reads an image.
pub(super) fn read(target: &Target, path: &Path) -> Result<Vec<u8>> {
    let hint = || format!("check that {} can be read", path.display());
    std::fs::read(path).map_err(|error| attach(&target.to_string(), error.to_string(), hint()))
}

fn start(target: &Target, name: &str, bytes: &[u8], options: &OpenOptions) -> Result<Opened> {
    let defaults = BootOptions::default();
    let boot = BootOptions {
        memory: options.memory.unwrap_or(defaults.memory),
        vcpus: options.vcpus.unwrap_or(defaults.vcpus),
        command_line: options.command_line.clone(),
    };
    boot.check()?;
    let image = Image::parse(name, bytes)?;
    let library = library(target, options)?;
    // What the library is refused for is about attaching, and no fault of the guest's image.
    super::emu::probe(&library).map_err(|error| attach(&target.to_string(), error.to_string(), hint()))?;
    let driver = EmuDriver::boot(&library, name, &image, &boot)?;
    Ok(Opened { driver: Box::new(driver), symbols: image.symbols })
}

fn library(target: &Target, options: &OpenOptions) -> Result<PathBuf> {
    let named = options.libunicorn.clone().or_else(|| std::env::var_os(LIBRARY_VARIABLE).map(PathBuf::from));
    let missing = |reason: String| attach(&target.to_string(), reason, hint());
    let path = named.filter(|path| path != Path::new("")).ok_or_else(|| missing("no Unicorn library was named".to_owned()))?;
    // A bare name would be looked for along the loader's path, and could be another library than the one meant.
    if path.is_file() { Ok(path) } else { Err(missing(format!("there is no Unicorn library at {}", path.display()))) }
}

fn hint() -> String {
    format!("pip install unicorn, and name its libunicorn.so.2 in {LIBRARY_VARIABLE} (the Python package finds it by itself)")
}

pub(super) fn attach(target: &str, reason: String, hint: String) -> VmiError {
    VmiError::Attach { target: target.to_owned(), reason, hint }
}
