use std::time::{Duration, Instant};
use vmitap::driver::emu::{BootOptions, EmuDriver};
use vmitap::driver::*;
use vmitap::event::*;
use vmitap::*;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let bytes = std::fs::read(&args[1]).unwrap();
    let image = vmitap::image::Image::parse(&args[1], &bytes).unwrap();
    let lib = std::env::var("VMITAP_LIBUNICORN").unwrap();
    let options = BootOptions {
        command_line: args.get(2).cloned().unwrap_or_default(),
        vcpus: args.get(3).map_or(1, |v| v.parse().unwrap()),
        ..Default::default()
    };
    let mut vm = EmuDriver::boot(std::path::Path::new(&lib), "bringup", &image, &options).unwrap();
    let mut hits = 0u64;
    let mut reads = 0u64;
    let mut writes = 0u64;
    let sym = args.get(4).cloned().filter(|s| !s.is_empty());
    let mut tap = None;
    if let Some(sym) = &sym {
        let va = image.symbols.resolve(sym).unwrap();
        let seg = image.segments.iter().find(|s| va.0 >= s.va.0 && va.0 < s.va.0 + s.memory_size).unwrap();
        let pa = Pa(va.0 - seg.va.0 + seg.pa.0);
        let view = vm.create_view(MemoryAccess::RWX).unwrap();
        let frame = vm.allocate_frame().unwrap();
        let mut page = [0; 4096];
        vm.read(pa.gfn().pa(0), &mut page).unwrap();
        page[pa.page_offset() as usize] = 0xcc;
        vm.write(frame.pa(0), &page).unwrap();
        vm.set_memory_access(view, pa.gfn(), MemoryAccess::X).unwrap();
        vm.remap(view, pa.gfn(), Some(frame)).unwrap();
        vm.switch_to_view(view).unwrap();
        vm.monitor(Monitor::Breakpoint, true).unwrap();
        tap = Some((va, view));
    }
    let t = Instant::now();
    loop {
        match vm.wait(Duration::from_secs(10)).unwrap() {
            Wait::Event(e) => {
                match e.reason {
                    EventReason::Breakpoint { .. } => {
                        if tap.is_some_and(|t| t.0 == e.registers.rip()) {
                            hits += 1
                        } else {
                            println!("int3 at {}", e.registers.rip());
                            vm.respond(e.vcpu, &VmiEventResponse::action(EventAction::Reinject)).unwrap();
                            continue;
                        }
                    }
                    EventReason::MemoryAccess { access, .. } => {
                        if access == MemoryAccess::R {
                            reads += 1
                        } else {
                            writes += 1;
                        }
                    }
                    _ => {}
                }
                vm.respond(
                    e.vcpu,
                    &VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(tap.unwrap().1),
                )
                .unwrap();
            }
            other => {
                println!("{other:?}");
                break;
            }
        }
    }
    let d = t.elapsed();
    println!(
        "hits {hits} reads {reads} writes {writes} in {d:?}: {:.3} us/event; virtual time {} halted {}",
        d.as_secs_f64() * 1e6 / (hits + reads + writes).max(1) as f64,
        vm.virtual_time(),
        vm.has_halted()
    );
    println!("console: {}", String::from_utf8_lossy(&vm.console()));
    for s in image.symbols.iter() {
        if matches!(s.kind, vmitap::symbols::SymbolKind::Function) {
            continue;
        }
        if let Some(seg) = image.segments.iter().find(|g| s.va.0 >= g.va.0 && s.va.0 + 8 <= g.va.0 + g.memory_size) {
            let mut b = [0; 8];
            vm.read(Pa(s.va.0 - seg.va.0 + seg.pa.0), &mut b).unwrap();
            if args.get(5).is_some_and(|f| f.split(',').any(|f| s.name.starts_with(f))) {
                println!("{} = {:#x}", s.name, u64::from_le_bytes(b));
            }
        }
    }
    println!("rip {:#x} rsp {:#x}", vm.registers(VcpuId(0)).unwrap().gp.rip, vm.registers(VcpuId(0)).unwrap().gp.rsp);
}
