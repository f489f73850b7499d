//! What can go wrong.

use std::fmt;

/// A call of one of Xen's libraries failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// The function.
    pub op: &'static str,
    /// The error number it left; 0 if none.
    pub errno: i32,
}

impl Error {
    pub(crate) fn last(op: &'static str) -> Self {
        Self { op, errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    pub(crate) const fn new(op: &'static str, errno: i32) -> Self {
        Self { op, errno }
    }

    /// The system's words for the number.
    pub fn text(&self) -> String {
        let text = std::io::Error::from_raw_os_error(self.errno).to_string();
        text.split(" (os error").next().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (errno {})", self.op, self.text(), self.errno)
    }
}

impl std::error::Error for Error {}

/// Xen cannot be used on this machine, or not by this program.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no privileged command device: no Xen, or not its control domain.
    NotControlDomain,
    /// A library is not installed.
    Missing {
        /// Its name without the release.
        library: &'static str,
        /// The names that were tried, and what the loader said to the first of them that exists.
        tried: Vec<String>,
        /// What the loader said of the file that is there but cannot be opened; empty if there is none.
        reason: String,
    },
    /// A library has no such function: it is older than Xen 4.14.
    Symbol {
        /// The file.
        library: String,
        /// The function.
        symbol: String,
    },
    /// The library could not open its devices.
    Refused {
        /// The file.
        library: String,
        /// The call.
        error: Error,
    },
    /// The hypervisor does not speak to this library: it is of another release of Xen, or a security policy forbids it.
    OtherRelease {
        /// The files that were tried.
        tried: Vec<String>,
        /// The running hypervisor, `"4.17"`, if it is known.
        hypervisor: Option<String>,
        /// The call.
        error: Error,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotControlDomain => f.write_str("this is not a Xen control domain: there is no /dev/xen/privcmd"),
            Self::Missing { library, tried, reason } if reason.is_empty() => {
                write!(f, "{library} is not installed (looked for {})", tried.join(", "))
            }
            Self::Missing { library, reason, .. } => write!(f, "{library} cannot be opened: {reason}"),
            Self::Symbol { library, symbol } => write!(f, "{library} has no {symbol}"),
            Self::Refused { library, error } => write!(f, "{library} cannot open its devices: {error}"),
            Self::OtherRelease { tried, hypervisor, error } => {
                let release = hypervisor.as_deref().map_or_else(String::new, |release| format!(" of Xen {release}"));
                write!(f, "the hypervisor{release} does not answer {}: {error}", tried.join(", "))
            }
        }
    }
}

impl std::error::Error for LoadError {}
