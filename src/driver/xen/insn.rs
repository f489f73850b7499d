//! What one instruction does, as far as it decides how the driver has it executed.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits};

use crate::arch::amd64::{Registers, StringStore, rflags};

/// The longest instruction (Intel SDM vol. 2, 2.3.11).
pub const MAX_LEN: usize = 15;
/// CR4.CET: CALL and RET use a shadow stack, which Xen's emulator does not know.
const CR4_CET: u64 = 1 << 23;
/// Stores of one instruction that are looked at.
const NO_STORES: usize = 4;
/// Bytes that a store has at most, where its instruction does not say how many: XSAVE's area.
const MAX_STORE: u64 = 4096;

/// A store: the first address and how many bytes.
pub type Store = (u64, u64);

/// What is known of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Insn {
    /// Bytes.
    pub len: u8,
    /// Xen's emulator is known to execute it as the processor does.
    pub emulates: bool,
    /// A repeated string instruction that has more than one round to go.
    pub repeats: bool,
    /// What it stores to; unused places have no bytes.
    pub stores: [Store; NO_STORES],
    /// Of a repeated instruction: the store of the round to come.
    pub round: Store,
    /// How far its stores reach is not known: no further than that.
    pub is_vague: bool,
}

impl Insn {
    /// The store that is carried out or thrown away as one: the whole of `store`, but of a repeated instruction only the round to come; `None`: how
    /// far it reaches is not known.
    pub fn at_once(&self, store: Store) -> Option<Store> {
        (!self.is_vague).then_some(if self.repeats { self.round } else { store })
    }
}

/// Instructions that Xen's emulator has executed since before 4.14, with general-purpose registers and plain memory
/// (arch/x86/x86_emulate/x86_emulate.c). Whatever is not here is stepped by the processor.
const fn is_plain(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Push
            | M::Pop
            | M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Imul
            | M::Mul
            | M::Nop
            | M::Endbr64
            | M::Cdq
            | M::Cqo
            | M::Cdqe
            | M::Cwde
            | M::Bt
            | M::Bswap
            | M::Leave
            | M::Jmp
            | M::Call
            | M::Ret
            | M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Movsq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsd
            | M::Cmpsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
    )
}

/// Vector loads and stores that Xen's emulator hands to the processor with the memory operand copied (since 4.10).
const fn is_vector_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Movups | M::Movaps | M::Movupd | M::Movapd | M::Movdqu | M::Movdqa)
}

/// Looks at the instruction in `bytes`, which begin at `registers.rip`; `None` if they are no whole instruction of 64-bit code.
pub fn look(bytes: &[u8], registers: &Registers) -> Option<Insn> {
    if !registers.is_64_bit() {
        return None;
    }
    let gp = &registers.gp;
    let mut decoder = Decoder::with_ip(64, bytes, gp.rip, DecoderOptions::NONE);
    let insn = decoder.decode();
    if insn.is_invalid() {
        return None;
    }
    let mnemonic = insn.mnemonic();
    let is_string = insn.is_string_instruction();
    let is_narrow = (0..insn.op_count())
        .any(|operand| matches!(insn.op_kind(operand), OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI));
    let rounds = if is_narrow { gp.rcx & 0xffff_ffff } else { gp.rcx };
    let has_rounds = is_string && (insn.has_rep_prefix() || insn.has_repne_prefix());
    let repeats = has_rounds && rounds > 1;
    let has_system_operand = (0..insn.op_count()).any(|operand| {
        insn.op_kind(operand) == OpKind::Register && {
            let register = insn.op_register(operand);
            register.is_segment_register() || register.is_cr() || register.is_dr()
        }
    });
    let is_far = insn.is_jmp_far() || insn.is_jmp_far_indirect() || insn.is_call_far() || insn.is_call_far_indirect();
    let uses_shadow_stack =
        registers.cr4 & CR4_CET != 0 && matches!(mnemonic, Mnemonic::Call | Mnemonic::Ret | Mnemonic::Endbr64 | Mnemonic::Jmp);
    let is_known = is_plain(mnemonic) || is_vector_move(mnemonic) || insn.is_jcc_short_or_near() || is_conditional(mnemonic);
    let emulates = is_known
        && !has_system_operand
        && !is_far
        && !uses_shadow_stack
        && !insn.has_lock_prefix()
        // A guest that single-steps itself is owed an exception after the instruction.
        && gp.rflags & rflags::TF == 0
        && insn.rflags_modified() & (RflagsBits::IF | RflagsBits::AC) == 0
        && !overlaps(&insn, registers);
    let mut looked_at =
        Insn { len: insn.len() as u8, emulates, repeats, stores: [(0, 0); NO_STORES], round: (0, 0), is_vague: false };
    if has_rounds {
        // Of these the decoder does not say how much a round moves. Without a round to go nothing is stored.
        if let Some(string) = StringStore::decode(bytes, true).filter(|_| rounds > 0) {
            let [store, ..] = &mut looked_at.stores;
            (*store, looked_at.round) = (of(&string.rest(gp)), of(&string.next(gp)));
        }
        return Some(looked_at);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&insn);
    let writes = info.used_memory().iter().filter(|memory| {
        matches!(memory.access(), OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
    });
    for (place, memory) in looked_at.stores.iter_mut().zip(writes) {
        let Some(first) = memory.virtual_address(0, |register, _, _| value(register, registers)) else { continue };
        // XSAVE and the like do not say how much.
        let size = memory.memory_size().size() as u64;
        looked_at.is_vague |= size == 0;
        *place = (first, if size == 0 { MAX_STORE } else { size });
    }
    Some(looked_at)
}

const fn of(range: &Range<u64>) -> Store {
    (range.start, range.end - range.start)
}

const fn is_conditional(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovne
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovs
            | M::Cmovns
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setne
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Sets
            | M::Setns
    )
}

/// A string copy onto itself: what the emulator reads in one piece the processor reads in rounds.
fn overlaps(insn: &iced_x86::Instruction, registers: &Registers) -> bool {
    let size = match insn.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq if insn.is_string_instruction() => {
            insn.memory_size().size() as u64
        }
        _ => return false,
    };
    let gp = &registers.gp;
    let rounds = if insn.has_rep_prefix() || insn.has_repne_prefix() { gp.rcx } else { 1 };
    gp.rsi.abs_diff(gp.rdi) < rounds.saturating_mul(size)
}

fn value(register: Register, registers: &Registers) -> Option<u64> {
    let gp = &registers.gp;
    let full = match register {
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
        Register::FS => return Some(registers.fs.base),
        Register::GS => return Some(registers.gs.base),
        other => other.full_register(),
    };
    let whole = match full {
        Register::RAX => gp.rax,
        Register::RCX => gp.rcx,
        Register::RDX => gp.rdx,
        Register::RBX => gp.rbx,
        Register::RSP => gp.rsp,
        Register::RBP => gp.rbp,
        Register::RSI => gp.rsi,
        Register::RDI => gp.rdi,
        Register::R8 => gp.r8,
        Register::R9 => gp.r9,
        Register::R10 => gp.r10,
        Register::R11 => gp.r11,
        Register::R12 => gp.r12,
        Register::R13 => gp.r13,
        Register::R14 => gp.r14,
        Register::R15 => gp.r15,
        // A vector of addresses (scatter): not followed.
        _ => return None,
    };
    Some(if register.size() == 4 { whole & 0xffff_ffff } else { whole })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::amd64::efer;
    use crate::arch::amd64::{GpRegisters, Segment};

    fn registers() -> Registers {
        Registers {
            gp: GpRegisters { rip: 0x40_0000, rsp: 0x7000, rdi: 0x9000, rsi: 0x5000, rcx: 16, rbx: 0x1234, ..Default::default() },
            efer: efer::LMA,
            cs: Segment { attributes: 0xa09b, ..Default::default() },
            fs: Segment { base: 0x10_0000, ..Default::default() },
            ..Registers::default()
        }
    }

    fn stores(insn: &Insn) -> Vec<Store> {
        insn.stores.iter().copied().filter(|(_, len)| *len > 0).collect()
    }

    #[test]
    fn a_prologue_is_emulated_and_its_stores_are_known() {
        let push = look(&[0x55, 0x90], &registers()).unwrap();
        assert!(push.emulates && !push.repeats);
        assert_eq!((push.len, stores(&push)), (1, vec![(0x6ff8, 8)]));
        let mov = look(&[0x48, 0x89, 0x5c, 0x24, 0x08], &registers()).unwrap();
        assert_eq!((mov.emulates, stores(&mov)), (true, vec![(0x7008, 8)]));
        let fs = look(&[0x64, 0x89, 0x1b], &registers()).unwrap();
        assert_eq!(stores(&fs), [(0x10_1234, 4)]);
        let call = look(&[0xe8, 0, 0, 0, 0], &registers()).unwrap();
        assert_eq!((call.emulates, stores(&call)), (true, vec![(0x6ff8, 8)]));
        let lea = look(&[0x48, 0x8d, 0x03], &registers()).unwrap();
        assert_eq!((lea.emulates, stores(&lea)), (true, vec![]));
    }

    #[test]
    fn what_changes_the_machine_or_waits_is_left_to_the_processor() {
        for bytes in [
            &[0xfa][..],               // cli
            &[0xfb],                   // sti
            &[0x8e, 0xd0],             // mov ss, eax
            &[0x0f, 0x22, 0xd8],       // mov cr3, rax
            &[0x9d],                   // popfq
            &[0x48, 0xcf],             // iretq
            &[0x0f, 0x05],             // syscall
            &[0x0f, 0xae, 0x27],       // xsave [rdi]
            &[0xf0, 0x48, 0x01, 0x03], // lock add [rbx], rax
            &[0xe4, 0x60],             // in al, 0x60
            &[0xf4],                   // hlt
            &[0xcc],                   // int3
            &[0x0f, 0xa2],             // cpuid
            &[0x0f, 0x01, 0xf8],       // swapgs
            &[0xc5, 0xfe, 0x6f, 0x07], // vmovdqu ymm0, [rdi]
        ] {
            assert!(!look(bytes, &registers()).unwrap().emulates, "{bytes:x?}");
        }
        let mut tf = registers();
        tf.gp.rflags = rflags::TF;
        assert!(!look(&[0x55], &tf).unwrap().emulates);
        let mut cet = registers();
        cet.cr4 = CR4_CET;
        assert!(!look(&[0xc3], &cet).unwrap().emulates);
    }

    #[test]
    fn a_string_instruction_repeats_and_stores_to_all_of_its_range() {
        let movs = look(&[0xf3, 0x48, 0xa5], &registers()).unwrap();
        assert!(movs.repeats && movs.emulates);
        assert_eq!(stores(&movs), [(0x9000, 128)]);
        let mut backwards = registers();
        backwards.gp.rflags = rflags::DF;
        assert_eq!(stores(&look(&[0xf3, 0xaa], &backwards).unwrap()), [(0x9000 - 15, 16)]);
        let mut close = registers();
        close.gp.rdi = close.gp.rsi + 8;
        assert!(!look(&[0xf3, 0x48, 0xa5], &close).unwrap().emulates);
        assert!(!look(&[0xa4], &registers()).unwrap().repeats);
    }

    #[test]
    fn a_string_instruction_with_short_addresses_counts_and_stores_with_half_of_its_registers() {
        let mut high = registers();
        high.gp = GpRegisters { rdi: 0xff_0000_9000, rcx: 0xff_0000_0010, ..high.gp };
        // rep stosd
        let stos = look(&[0x67, 0xf3, 0xab], &high).unwrap();
        assert!(stos.repeats);
        assert_eq!((stores(&stos), stos.round), (vec![(0x9000, 64)], (0x9000, 4)));
        high.gp.rcx = 0xff_0000_0001;
        let last = look(&[0x67, 0xf3, 0xab], &high).unwrap();
        assert!(!last.repeats);
        assert_eq!((stores(&last), last.at_once((0x9000, 4))), (vec![(0x9000, 4)], Some((0x9000, 4))));
    }

    #[test]
    fn the_last_round_of_a_string_instruction_is_a_store_of_its_size() {
        let mut last = registers();
        last.gp.rcx = 1;
        for (bytes, size) in [(&[0xf3, 0xaa][..], 1), (&[0xf3, 0x66, 0xa5], 2), (&[0xf3, 0x6d], 4), (&[0xf3, 0x48, 0xab], 8)] {
            assert_eq!(stores(&look(bytes, &last).unwrap()), [(0x9000, size)], "{bytes:02x?}");
        }
        for (bytes, size) in [(&[0xa4][..], 1), (&[0x66, 0xab], 2), (&[0x6d], 4), (&[0x48, 0xa5], 8)] {
            assert_eq!(stores(&look(bytes, &last).unwrap()), [(0x9000, size)], "{bytes:02x?}, not repeated");
        }
        last.gp.rcx = 0;
        assert_eq!(stores(&look(&[0xf3, 0xaa], &last).unwrap()), []);
    }

    #[test]
    fn how_far_xsave_reaches_is_not_known_and_fxsave_says_it() {
        let xsave = look(&[0x0f, 0xae, 0x27], &registers()).unwrap();
        assert_eq!((stores(&xsave), xsave.is_vague, xsave.at_once((0x9000, 4096))), (vec![(0x9000, 4096)], true, None));
        let fxsave = look(&[0x0f, 0xae, 0x07], &registers()).unwrap();
        assert_eq!((stores(&fxsave), fxsave.at_once((0x9000, 512))), (vec![(0x9000, 512)], Some((0x9000, 512))));
    }

    #[test]
    fn half_an_instruction_and_code_that_is_not_64_bit_are_not_guessed_at() {
        assert_eq!(look(&[0x48, 0x89], &registers()), None);
        assert_eq!(look(&[0x55], &Registers { efer: 0, ..registers() }), None);
    }
}
