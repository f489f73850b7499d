//! The types against the headers that are installed here, if any are.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on panics"
)]

use std::mem::offset_of;
use std::process::Command;

use xen_sys::types::{
    Debug, DomctlMonitor, EventHead, EventV6, EventV7, HvmHwCpu, MemAccess, RegsV6, RegsV7, RingHead, SaveDescriptor, ToolLog,
};

/// (C expression, our value); those that depend on the version of the event ring come in pairs (6, 7).
fn expectations(version: u32) -> Vec<(String, usize)> {
    let size = |name: &str| format!("sizeof({name})");
    let offset = |name: &str, field: &str| format!("offsetof({name}, {field})");
    let mut all = vec![
        (size("struct vm_event_mem_access"), size_of::<MemAccess>()),
        (size("struct vm_event_debug"), size_of::<Debug>()),
        (offset("struct vm_event_debug", "insn_length"), offset_of!(Debug, insn_length)),
        (offset("vm_event_request_t", "u"), offset_of!(EventHead, u)),
        (offset("vm_event_request_t", "data"), size_of::<EventHead>()),
        (size("struct hvm_hw_cpu"), size_of::<HvmHwCpu>()),
        (offset("struct hvm_hw_cpu", "rip"), offset_of!(HvmHwCpu, rip)),
        (offset("struct hvm_hw_cpu", "cs_sel"), offset_of!(HvmHwCpu, cs_sel)),
        (offset("struct hvm_hw_cpu", "gdtr_limit"), offset_of!(HvmHwCpu, gdtr_limit)),
        (offset("struct hvm_hw_cpu", "cs_arbytes"), offset_of!(HvmHwCpu, cs_arbytes)),
        (offset("struct hvm_hw_cpu", "shadow_gs"), offset_of!(HvmHwCpu, shadow_gs)),
        (offset("struct hvm_hw_cpu", "msr_efer"), offset_of!(HvmHwCpu, msr_efer)),
        (offset("struct hvm_hw_cpu", "flags"), offset_of!(HvmHwCpu, flags)),
        (size("struct hvm_save_descriptor"), size_of::<SaveDescriptor>()),
        (size("struct xen_domctl"), size_of::<DomctlMonitor>()),
        (offset("struct xen_domctl", "u"), offset_of!(DomctlMonitor, op)),
        (offset("struct xen_domctl", "u.monitor_op.event"), offset_of!(DomctlMonitor, event)),
        (offset("struct probe_sring", "ring"), size_of::<RingHead>()),
        (size("xentoollog_logger"), size_of::<ToolLog>()),
        ("XENMEM_access_rwx".to_owned(), xen_sys::types::access::RWX as usize),
        ("XENMEM_access_x".to_owned(), xen_sys::types::access::X as usize),
        ("VM_EVENT_FLAG_FAST_SINGLESTEP".to_owned(), xen_sys::types::flag::FAST_SINGLESTEP as usize),
        ("VM_EVENT_FLAG_SET_EMUL_INSN_DATA".to_owned(), xen_sys::types::flag::SET_EMUL_INSN_DATA as usize),
        ("VM_EVENT_REASON_EMUL_UNIMPLEMENTED".to_owned(), xen_sys::types::reason::EMUL_UNIMPLEMENTED as usize),
        ("XEN_DOMCTL_monitor_op".to_owned(), xen_sys::types::DOMCTL_MONITOR_OP as usize),
        ("XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP".to_owned(), xen_sys::types::monitor_event::SINGLESTEP as usize),
        ("XEN_DOMCTL_MONITOR_EVENT_EMUL_UNIMPLEMENTED".to_owned(), xen_sys::types::monitor_event::EMUL_UNIMPLEMENTED as usize),
        ("XEN_DOMINF_hap".to_owned(), xen_sys::types::dominf::HAP as usize),
        ("HVM_PARAM_ALTP2M".to_owned(), xen_sys::types::HVM_PARAM_ALTP2M as usize),
        ("XEN_ALTP2M_external".to_owned(), xen_sys::types::ALTP2M_EXTERNAL as usize),
        ("XENVER_commandline".to_owned(), xen_sys::types::XENVER_COMMANDLINE as usize),
    ];
    let regs = |field: &str| offset("struct vm_event_regs_x86", field);
    all.extend(match version {
        6 => vec![
            (size("vm_event_request_t"), size_of::<EventV6>()),
            (regs("cs_base"), offset_of!(RegsV6, cs_base)),
            (regs("cs_sel"), offset_of!(RegsV6, cs_sel)),
            (regs("shadow_gs"), offset_of!(RegsV6, shadow_gs)),
        ],
        7 => vec![
            (size("vm_event_request_t"), size_of::<EventV7>()),
            (regs("cs_base"), offset_of!(RegsV7, cs_base)),
            (regs("cs_sel"), offset_of!(RegsV7, cs_sel)),
            (regs("shadow_gs"), offset_of!(RegsV7, shadow_gs)),
        ],
        other => panic!("the installed headers have version {other} of the event ring, which xen-sys does not know"),
    });
    all
}

fn print(folder: &std::path::Path, expressions: &[String]) -> Option<Vec<usize>> {
    let source = folder.join("probe.c");
    let lines: Vec<String> = expressions.iter().map(|line| format!("printf(\"%zu\\n\", (size_t)({line}));")).collect();
    let lines = lines.concat();
    let includes = "#include <stdio.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <xenctrl.h>\n#include <xentoollog.h>\n\
        #include <xen/vm_event.h>\n#include <xen/hvm/save.h>\n#include <xen/hvm/params.h>\n#include <xen/version.h>\n\
        #include <xen/io/ring.h>\n#include <xen/memory.h>\ntypedef struct { int x; } e;\nDEFINE_RING_TYPES(probe, e, e);\n";
    std::fs::write(&source, format!("{includes}int main(void) {{ {lines} return 0; }}")).unwrap();
    let program = folder.join("probe");
    let built = Command::new("cc").arg(&source).arg("-o").arg(&program).output().ok()?;
    if !built.status.success() {
        println!("{}", String::from_utf8_lossy(&built.stderr));
        return None;
    }
    let output = Command::new(&program).output().unwrap();
    Some(String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect())
}

#[test]
fn types_and_constants_are_those_of_the_installed_headers() {
    let folder = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let version = "VM_EVENT_INTERFACE_VERSION".to_owned();
    if !std::path::Path::new("/usr/include/xenctrl.h").exists() {
        println!("SKIPPED: Xen's headers are not installed (Debian: libxen-dev)");
        return;
    }
    let Some(found) = print(&folder, &[version]) else {
        println!("SKIPPED: no C compiler, or Xen's headers cannot be compiled");
        return;
    };
    let expected = expectations(found[0] as u32);
    let expressions: Vec<String> = expected.iter().map(|(expression, _)| expression.clone()).collect();
    let found = print(&folder, &expressions).expect("the version compiled, so the rest must");
    for ((expression, ours), theirs) in expected.iter().zip(found) {
        assert_eq!(*ours, theirs, "{expression}");
    }
}
