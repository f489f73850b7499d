//! Finding a domain, and finding out whether and how it can be tapped.

use std::path::Path;

use xen_sys::types::{ALTP2M_EXTERNAL, DomainInfo, HVM_PARAM_ALTP2M, dominf, monitor_event};
use xen_sys::{Control, Level, LoadError, Xen, errno};

use crate::error::{Result, VmiError};

use super::abi::{Abi, Layout};

/// Why something cannot be had, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Obstacle {
    /// What is in the way.
    pub reason: String,
    /// What to do about it, in one sentence.
    pub hint: String,
}

impl Obstacle {
    fn new(reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { reason: reason.into(), hint: hint.into() }
    }

    /// As an error of attaching to `target`.
    pub fn error(self, target: &str) -> VmiError {
        VmiError::Attach { target: target.to_owned(), reason: self.reason, hint: self.hint }
    }
}

/// A domain, as it is listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DomainSummary {
    /// Its number.
    pub id: u32,
    /// Its name; empty while it has none.
    pub name: String,
    /// Whether it is an HVM or PVH domain; else it is PV.
    pub is_hvm: bool,
    /// How many vCPUs it has.
    pub vcpus: u16,
    /// Bytes of memory it has.
    pub memory_size: u64,
    /// Why it cannot be tapped; `None` if nothing is known to be in the way.
    pub obstacle: Option<Obstacle>,
}

/// The text of Xen's libraries goes where ours does.
pub fn sink(level: Level, text: &str) {
    match level {
        Level::Error | Level::Warn => log::warn!("{text}"),
        Level::Info => log::info!("{text}"),
        Level::Debug => log::debug!("{text}"),
    }
}

/// Opens Xen's libraries: the host's own, or libxenctrl at a path.
pub fn open_xen(library: Option<&Path>) -> Result<Xen, Obstacle> {
    let opened = library.map_or_else(|| Xen::open(sink), |path| Xen::open_named(path, sink));
    opened.map_err(|error| {
        let hint = match &error {
            LoadError::NotControlDomain => "run vmitap as root in the control domain (dom0) of a machine that runs Xen".to_owned(),
            LoadError::Missing { library, .. } => {
                format!("install Xen's tools of the release that runs (Debian: xen-utils); they hold {library}, or name the file in {}", xen_sys::LIBRARY_VARIABLE)
            }
            LoadError::Symbol { .. } => "vmitap needs Xen 4.14 or later, and its own libraries".to_owned(),
            LoadError::Refused { error, .. } if is_denied(error.errno) => "run vmitap as root".to_owned(),
            LoadError::Refused { .. } => "run vmitap as root in the control domain; /dev/xen/privcmd must be usable".to_owned(),
            _ => "install the libxenctrl of the hypervisor that runs; if it is that one, a security policy (XSM) forbids this domain to control others".to_owned(),
        };
        Obstacle::new(error.to_string(), hint)
    })
}

const fn is_denied(number: i32) -> bool {
    matches!(number, errno::EPERM | errno::EACCES)
}

/// What an error of a call means, if it means nothing special.
pub fn explain(error: &xen_sys::Error) -> Obstacle {
    let hint = match error.errno {
        errno::EPERM | errno::EACCES => {
            "run vmitap as root in the control domain; with XSM, the policy must let this domain control and monitor the other"
        }
        errno::ESRCH => "the domain has just ended: look at `vmitap list`",
        errno::ENOMEM => "give the domain more memory for its page tables (shadow_memory in its configuration), or free some",
        _ => "the system's log (xl dmesg) may say more",
    };
    Obstacle::new(error.to_string(), hint)
}

/// The running release and the ring's version.
pub fn find_abi(control: &Control) -> Result<Abi, Obstacle> {
    let release = control.release().map_err(|error| explain(&error))?;
    let extra = control.extra_version().unwrap_or_default();
    let version = control.vm_event_version().map_err(|error| explain(&error))?;
    let layout = Layout::of(version).ok_or_else(|| {
        Obstacle::new(
            format!("Xen {}.{} has version {version} of the event ring; vmitap knows 6 and 7", release.0, release.1),
            if version < 6 { "vmitap needs Xen 4.14 or later" } else { "a newer vmitap may know it" },
        )
    })?;
    Ok(Abi { release, extra, layout })
}

/// The domain that is meant, with its name: a number, or a name in xenstore. Domains that have no name yet are passed over.
pub fn find_domain(xen: &Xen, which: &str) -> Result<(DomainInfo, String), Obstacle> {
    let store = xen.store();
    let name_of = |id: u32| store.as_ref().and_then(|store| store.domain_name(id));
    if let Ok(id) = which.parse::<u32>() {
        let info = xen.control().domain(id).map_err(|error| explain(&error))?;
        let info =
            info.ok_or_else(|| Obstacle::new(format!("there is no domain {id}"), "`vmitap list` shows which there are"))?;
        return Ok((info, name_of(id).unwrap_or_else(|| format!("domain {id}"))));
    }
    if store.is_none() {
        return Err(Obstacle::new(
            "domains have no names: xenstore cannot be reached",
            "name the domain by its number, as in \"xen:3\"",
        ));
    }
    let named: Vec<DomainInfo> =
        all_domains(xen.control())?.into_iter().filter(|info| name_of(info.domain.into()).as_deref() == Some(which)).collect();
    match named.as_slice() {
        [info] => Ok((*info, which.to_owned())),
        [] => Err(Obstacle::new(format!("no domain has the name {which:?}"), "`vmitap list` shows which there are")),
        several => {
            let ids: Vec<String> = several.iter().map(|info| info.domain.to_string()).collect();
            Err(Obstacle::new(
                format!("several domains have the name {which:?}: {}", ids.join(", ")),
                "name the domain by its number, as in \"xen:3\"",
            ))
        }
    }
}

/// Number and UUID of a domain: no other domain ever has both, also not on another start of the machine.
///
/// # Errors
/// [`VmiError::Attach`] if Xen cannot be used here or there is no such domain.
pub fn identity(which: &str, library: Option<&Path>) -> Result<String> {
    let refuse = |obstacle: Obstacle| obstacle.error(&format!("xen:{which}"));
    let xen = open_xen(library).map_err(refuse)?;
    let (info, _) = find_domain(&xen, which).map_err(refuse)?;
    Ok(format!("{}-{:032x}", info.domain, u128::from_be_bytes(info.handle)))
}

fn all_domains(control: &Control) -> Result<Vec<DomainInfo>, Obstacle> {
    let mut found: Vec<DomainInfo> = Vec::new();
    let mut first = 0;
    while let Some(info) = control.next_domain(first).map_err(|error| explain(&error))? {
        first = u32::from(info.domain) + 1;
        found.push(info);
    }
    Ok(found)
}

/// How many vCPUs there are room for; 0 while the domain is being made.
pub fn vcpus(info: &DomainInfo) -> u16 {
    u16::try_from(info.max_vcpu_id.wrapping_add(1)).unwrap_or(0)
}

/// Whether a domain can be tapped, as far as can be told without changing it: the most that is written is a 0 over a 0. Returns the capability bits.
pub fn check(control: &Control, info: &DomainInfo) -> Result<u32, Obstacle> {
    let id = u32::from(info.domain);
    if id == 0 {
        return Err(Obstacle::new("domain 0 is the control domain itself", "tap another domain"));
    }
    if info.flags & dominf::DYING != 0 {
        return Err(Obstacle::new(format!("domain {id} is ending"), "start it again"));
    }
    if vcpus(info) == 0 {
        return Err(Obstacle::new(format!("domain {id} is still being made: it has no vCPUs yet"), "wait until it is there"));
    }
    if info.flags & dominf::HVM_GUEST == 0 {
        return Err(Obstacle::new(
            format!("domain {id} is a PV domain, whose memory Xen cannot show in several views"),
            "run the guest as PVH or HVM (type=\"pvh\" or type=\"hvm\" in its configuration)",
        ));
    }
    if info.flags & dominf::HAP == 0 {
        return Err(Obstacle::new(
            format!("domain {id} does not use hardware-assisted paging"),
            "remove hap=0 from its configuration, and hap=0 from Xen's command line",
        ));
    }
    let bits = control.monitor_capabilities(id).map_err(|error| match error.errno {
        errno::EOPNOTSUPP | errno::ENOSYS => Obstacle::new(
            format!("this Xen cannot monitor domain {id}: {error}"),
            "vmitap needs an Intel processor with VT-x and EPT, and a Xen built with vm_event",
        ),
        _ => explain(&error),
    })?;
    let has = |bit: u32| bits & (1 << bit) != 0;
    if !has(monitor_event::SOFTWARE_BREAKPOINT) {
        return Err(Obstacle::new("this Xen cannot tell INT3 instructions", "vmitap needs an Intel processor with VT-x and EPT"));
    }
    if !has(monitor_event::SINGLESTEP) {
        return Err(Obstacle::new(
            "the processor has no monitor trap flag, so that no instruction can be stepped over",
            "vmitap needs an Intel processor with VT-x, EPT and the monitor trap flag (every one since 2008; Bochs from 2.8 on)",
        ));
    }
    match control.altp2m_state(id) {
        Ok(_) => Ok(bits),
        Err(error) if matches!(error.errno, errno::EOPNOTSUPP | errno::ENOSYS) => Err(no_altp2m(control)),
        // Not switched on for this domain. From 4.19 on that is for its configuration to say, and the parameter is read-only; before, the 0 that
        // is there is written over itself (`hvm_allow_set_param` in arch/x86/hvm/hvm.c).
        Err(error) if error.errno == errno::EINVAL => match control.set_param(id, HVM_PARAM_ALTP2M, 0) {
            Ok(()) => Ok(bits),
            Err(error) if error.errno == errno::EEXIST => Err(not_in_domain(id)),
            Err(error) => Err(explain(&error)),
        },
        Err(error) => Err(explain(&error)),
    }
}

/// Whether Xen's command line has altp2m (docs/misc/xen-command-line.pandoc).
fn is_altp2m_asked_for(control: &Control) -> bool {
    let line = control.command_line().unwrap_or_default();
    let is_on = |word: &str| match word.split_once('=') {
        Some(("altp2m", value)) => !matches!(value, "0" | "no" | "off" | "false" | "disable"),
        _ => word == "altp2m",
    };
    line.split_whitespace().rfind(|word| word.split('=').next() == Some("altp2m")).is_some_and(is_on)
}

fn altp2m_is_off() -> Obstacle {
    Obstacle::new(
        "altp2m is off on Xen's command line",
        "add altp2m=1 to Xen's command line (not to dom0's kernel's) and restart the machine",
    )
}

/// Views are off in the whole machine: by the command line, or because the processor has none.
fn no_altp2m(control: &Control) -> Obstacle {
    if !is_altp2m_asked_for(control) {
        return altp2m_is_off();
    }
    Obstacle::new(
        "the processor has no second-level page tables that Xen can make views of, although altp2m is on Xen's command line",
        "vmitap needs an Intel processor with VT-x and EPT",
    )
}

fn not_in_domain(id: u32) -> Obstacle {
    Obstacle::new(
        format!("altp2m is off in domain {id}"),
        "put altp2m=\"external\" into the domain's configuration and create it again; nestedhvm excludes it",
    )
}

/// Switches views on. True if they were off.
pub fn switch_views_on(control: &Control, id: u32) -> Result<bool, Obstacle> {
    let was_on = match control.altp2m_state(id) {
        Ok(state) => state,
        Err(error) if error.errno == errno::EINVAL => {
            // Up to 4.18 a domain that was made without can still get it, once.
            control.set_param(id, HVM_PARAM_ALTP2M, ALTP2M_EXTERNAL).map_err(|_| not_in_domain(id))?;
            control.altp2m_state(id).map_err(|error| explain(&error))?
        }
        Err(error) if matches!(error.errno, errno::EOPNOTSUPP | errno::ENOSYS) => return Err(no_altp2m(control)),
        Err(error) => return Err(explain(&error)),
    };
    if !was_on {
        control.altp2m_set_state(id, true).map_err(|error| match error.errno {
            errno::EINVAL => not_in_domain(id),
            errno::EOPNOTSUPP | errno::ENOSYS => no_altp2m(control),
            _ => explain(&error),
        })?;
    }
    Ok(!was_on)
}

/// Whether somebody listens: rights of pages can be asked for only then (common/mem_access.c, from 4.14 to 4.22).
pub fn is_listened_to(control: &Control, id: u32) -> bool {
    // That one has none is an answer too.
    control.mem_access(id, 0).map_or_else(|error| error.errno == errno::ESRCH, |_| true)
}

fn busy(id: u32) -> Obstacle {
    Obstacle::new(
        format!("another program listens to domain {id} already"),
        "end it: a domain has one listener at a time. What a killed vmitap left is undone by `vmitap repair`; any other program that has crashed keeps its place until the domain is restarted",
    )
}

/// What an error of `xc_monitor_enable` means.
pub fn cannot_listen(error: &xen_sys::Error, id: u32) -> Obstacle {
    match error.errno {
        errno::EBUSY => busy(id),
        errno::ENODEV | errno::EOPNOTSUPP | errno::ENOSYS => Obstacle::new(
            format!("this Xen cannot monitor domain {id}: {error}"),
            "vmitap needs an Intel processor with VT-x and EPT, and a Xen built with vm_event",
        ),
        _ => explain(error),
    }
}

/// A Xen machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostSummary {
    /// Xen's version and the ring's.
    pub version: String,
    /// The files of Xen's libraries, libxenctrl first.
    pub libraries: Vec<String>,
    /// Why no domain of it can be tapped; `None` if nothing is known to be in the way.
    pub obstacle: Option<Obstacle>,
    /// Its domains, ascending by number.
    pub domains: Vec<DomainSummary>,
}

/// The machine and its domains, with what can be done with them. Changes nothing.
///
/// # Errors
/// [`VmiError::Attach`] if Xen cannot be used here, with what is missing.
pub fn host(library: Option<&Path>) -> Result<HostSummary> {
    let refuse = |obstacle: Obstacle| obstacle.error("xen");
    let xen = open_xen(library).map_err(refuse)?;
    let control = xen.control();
    let abi = find_abi(control).map_err(refuse)?;
    let store = xen.store();
    let domains = all_domains(control).map_err(refuse)?.into_iter().map(|info| DomainSummary {
        id: info.domain.into(),
        name: store.as_ref().and_then(|store| store.domain_name(info.domain.into())).unwrap_or_default(),
        is_hvm: info.flags & dominf::HVM_GUEST != 0,
        vcpus: vcpus(&info),
        memory_size: info.tot_pages.saturating_mul(crate::addr::PAGE_SIZE),
        obstacle: check(control, &info).err().or_else(|| {
            let id = info.domain.into();
            is_listened_to(control, id).then(|| busy(id))
        }),
    });
    Ok(HostSummary {
        version: version(&abi),
        libraries: xen.libraries().map(str::to_owned).collect(),
        obstacle: (!is_altp2m_asked_for(control)).then(altp2m_is_off),
        domains: domains.collect(),
    })
}

/// Xen's version, as a user would name it.
pub fn version(abi: &Abi) -> String {
    format!("xen {}.{}{} (vm_event {})", abi.release.0, abi.release.1, abi.extra, abi.layout.version)
}
