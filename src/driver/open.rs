//! Opens a guest by what the user calls it. The one place outside tests that names a concrete driver.

use std::path::{Path, PathBuf};

use crate::driver::VmiDriver;
use crate::driver::emu::{BootOptions, EmuDriver};
use crate::error::{Result, VmiError};
use crate::image::Image;
use crate::symbols::SymbolTable;

/// Names the engine's library where the options do not.
pub const LIBRARY_VARIABLE: &str = "VMITAP_LIBUNICORN";

/// The guest that comes with vmitap (guests/demo).
const DEMO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"));

const FORMS: &str = "write \"demo\" for the guest that comes with vmitap, or \"emu:PATH\" for an ELF image of your own";

/// Which guest.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// The guest that comes with vmitap, on the embedded driver.
    Demo,
    /// The ELF image at this path, on the embedded driver.
    Emu(PathBuf),
}

impl Target {
    /// Reads `"demo"` or `"emu:PATH"`.
    ///
    /// # Errors
    /// [`VmiError::Attach`], whose hint names the forms.
    pub fn parse(target: &str) -> Result<Self> {
        let refuse = |reason: &str| Err(attach(target, reason.to_owned(), FORMS.to_owned()));
        match target.split_once(':') {
            None if target == "demo" => Ok(Self::Demo),
            Some(("emu", "")) => refuse("\"emu:\" is followed by no path"),
            Some(("emu", path)) => Ok(Self::Emu(PathBuf::from(path))),
            Some(("xen", _)) => refuse("Xen domains are not part of this version"),
            Some(("dump", _)) => refuse("memory dumps are not part of this version"),
            _ => refuse("this is no kind of guest that vmitap knows"),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Demo => f.write_str("demo"),
            Self::Emu(path) => write!(f, "emu:{}", path.display()),
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
}

/// A guest that is ready to run and has not run yet.
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

/// Boots the guest. Nothing of it runs until the first [`crate::driver::VmiEvents::wait`].
///
/// # Errors
/// [`VmiError::Attach`] if the file or the engine's library cannot be used, [`VmiError::Image`] if the file is no such guest,
/// [`VmiError::InvalidArgument`] for options out of range. Nothing is left behind.
pub fn open(target: &Target, options: &OpenOptions) -> Result<Opened> {
    let defaults = BootOptions::default();
    let boot = BootOptions {
        memory: options.memory.unwrap_or(defaults.memory),
        vcpus: options.vcpus.unwrap_or(defaults.vcpus),
        command_line: options.command_line.clone(),
    };
    boot.check()?;
    match target {
        Target::Demo => start(target, "demo", DEMO, &boot, options),
        Target::Emu(path) => {
            let bytes = std::fs::read(path).map_err(|error| {
                attach(&target.to_string(), error.to_string(), format!("check that {} can be read", path.display()))
            })?;
            start(target, &path.display().to_string(), &bytes, &boot, options)
        }
    }
}

fn start(target: &Target, name: &str, bytes: &[u8], boot: &BootOptions, options: &OpenOptions) -> Result<Opened> {
    let image = Image::parse(name, bytes)?;
    let library = library(target, options)?;
    // What the library is refused for is about attaching, and no fault of the guest's image.
    super::emu::probe(&library).map_err(|error| attach(&target.to_string(), error.to_string(), hint()))?;
    let driver = EmuDriver::boot(&library, name, &image, boot)?;
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

fn attach(target: &str, reason: String, hint: String) -> VmiError {
    VmiError::Attach { target: target.to_owned(), reason, hint }
}
