//! The few instructions the driver has to know: those it carries out or watches itself, and those that need care when stepped.

/// The longest instruction, in bytes.
pub const MAX_LEN: usize = 15;

/// What an instruction is to the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Insn {
    /// The engine does it; the driver need not know it.
    Plain,
    /// The same, and it changes nothing but general-purpose registers, RIP, RFLAGS and memory.
    Integer,
    /// The engine does it, and its store of 16 bytes is two to the engine.
    WideStore,
    /// A repeated string instruction: the engine does one iteration at a time.
    RepString,
    /// After it, interrupts wait for one more instruction (`sti`, `mov ss`).
    InhibitsInterrupts,
    /// INT3, and its length with prefixes.
    Int3(u8),
    /// `hlt`.
    Halt,
    /// `swapgs`: the engine does it, and it changes an MSR.
    SwapGs,
    /// The bytes given end before the instruction can be told.
    Incomplete,
    /// One that the driver carries out or watches, and its length in bytes.
    System(System, u8),
}

/// Instructions that the driver carries out or watches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    Syscall,
    /// `mov crN, gpr`.
    WriteCr {
        cr: u8,
        gpr: u8,
    },
    Wrmsr,
    Rdmsr,
    Rdtsc,
    Rdtscp,
    Cpuid,
    /// `invlpg`, `invpcid`, `lmsw`: the engine does it, and the other engine's TLB must follow.
    DropsTranslations,
}

const fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// Tells what the instruction at the start of `bytes` is, in 64-bit mode.
pub fn decode(bytes: &[u8]) -> Insn {
    let (mut rep, mut operand_size) = (false, false);
    let mut rex = 0_u8;
    let mut at = 0;
    let byte = |at: usize| bytes.get(at).copied();
    let opcode = loop {
        let Some(byte) = byte(at) else { return Insn::Incomplete };
        if !is_prefix(byte) {
            break byte;
        }
        rep |= matches!(byte, 0xf2 | 0xf3);
        operand_size |= byte == 0x66;
        // REX counts only right before the opcode.
        rex = if byte & 0xf0 == 0x40 { byte } else { 0 };
        at += 1;
        if at >= MAX_LEN {
            return Insn::Plain;
        }
    };
    match opcode {
        0xcc => Insn::Int3(at as u8 + 1),
        0xf4 => Insn::Halt,
        0xfb => Insn::InhibitsInterrupts,
        0x8e => match byte(at + 1) {
            None => Insn::Incomplete,
            Some(modrm) if modrm >> 3 & 7 == 2 => Insn::InhibitsInterrupts,
            Some(_) => Insn::Plain,
        },
        0x6c..=0x6f | 0xa4..=0xa7 | 0xaa..=0xaf if rep => Insn::RepString,
        0x0f => match byte(at + 1) {
            // movups, movupd, movaps, movapd, movntps, movntpd; with F2 or F3 they are movss and movsd. movdqa and movdqu; movntdq.
            Some(0x11 | 0x29 | 0x2b) if !rep => Insn::WideStore,
            Some(0x7f) if rep || operand_size => Insn::WideStore,
            Some(0xe7) if operand_size => Insn::WideStore,
            _ => two_byte(byte, at, rex),
        },
        // Arithmetic (with its two-byte-free opcodes), push, pop, movsxd, jcc, test, xchg, mov, lea, string instructions, shifts, ret,
        // leave, call, jmp, and the groups with inc, dec, call, jmp and push. Not: far transfers, segment loads, IN, OUT, x87, VEX.
        0x00..=0x05
        | 0x08..=0x0d
        | 0x10..=0x15
        | 0x18..=0x1d
        | 0x20..=0x25
        | 0x28..=0x2d
        | 0x30..=0x35
        | 0x38..=0x3d
        | 0x50..=0x5f
        | 0x63
        | 0x68..=0x6b
        | 0x70..=0x81
        | 0x83..=0x8b
        | 0x8d
        | 0x90..=0x99
        | 0xa0..=0xc3
        | 0xc6
        | 0xc7
        | 0xc9
        | 0xd0..=0xd3
        | 0xe0..=0xe3
        | 0xe8
        | 0xe9
        | 0xeb
        | 0xf6
        | 0xf7
        | 0xfe => Insn::Integer,
        0xff => match byte(at + 1) {
            None => Insn::Incomplete,
            // /3 and /5 are far.
            Some(modrm) if matches!(modrm >> 3 & 7, 3 | 5) => Insn::Plain,
            Some(_) => Insn::Integer,
        },
        _ => Insn::Plain,
    }
}

fn two_byte(byte: impl Fn(usize) -> Option<u8>, at: usize, rex: u8) -> Insn {
    let len = at as u8 + 2;
    let Some(second) = byte(at + 1) else { return Insn::Incomplete };
    let system = match second {
        0x05 => System::Syscall,
        0x30 => System::Wrmsr,
        0x31 => System::Rdtsc,
        0x32 => System::Rdmsr,
        0xa2 => System::Cpuid,
        0x22 => {
            let Some(modrm) = byte(at + 2) else { return Insn::Incomplete };
            let cr = (modrm >> 3 & 7) | (rex << 1 & 8);
            return Insn::System(System::WriteCr { cr, gpr: (modrm & 7) | (rex << 3 & 8) }, len + 1);
        }
        0x01 => match byte(at + 2) {
            None => return Insn::Incomplete,
            Some(0xf8) => return Insn::SwapGs,
            Some(0xf9) => return Insn::System(System::Rdtscp, len + 1),
            // /6 is LMSW; /7 with a memory operand is INVLPG.
            Some(modrm) if modrm >> 3 & 7 == 6 || (modrm >> 3 & 7 == 7 && modrm < 0xc0) => System::DropsTranslations,
            Some(_) => return Insn::Plain,
        },
        0x38 => match byte(at + 2) {
            None => return Insn::Incomplete,
            Some(0x82) => System::DropsTranslations,
            Some(_) => return Insn::Plain,
        },
        // endbr64 and nop, cmov, jcc, setcc, bit tests and shifts, imul, movzx and movsx, xadd, bswap.
        0x1e
        | 0x1f
        | 0x40..=0x4f
        | 0x80..=0x9f
        | 0xa3..=0xa5
        | 0xab..=0xad
        | 0xaf
        | 0xb0
        | 0xb1
        | 0xb3
        | 0xb6..=0xbf
        | 0xc0
        | 0xc1
        | 0xc8..=0xcf => return Insn::Integer,
        _ => return Insn::Plain,
    };
    Insn::System(system, len)
}

/// Calls `found(first, last)` for each range of offsets in a page at which a system instruction may begin. A range holds the
/// opcode and the prefixes before it; what really begins there is for [`decode`] to tell when it is run.
pub fn scan(page: &[u8], mut found: impl FnMut(usize, usize)) {
    let byte = |at: usize| page.get(at).copied();
    let mut prefixes = 0;
    for (at, &value) in page.iter().enumerate() {
        if value == 0x0f {
            let candidate = match byte(at + 1) {
                None | Some(0x05 | 0x22 | 0x30 | 0x31 | 0x32 | 0xa2) => true,
                Some(0x01) => byte(at + 2).is_none_or(|modrm| modrm == 0xf9 || modrm >> 3 & 7 >= 6),
                Some(0x38) => byte(at + 2).is_none_or(|third| third == 0x82),
                Some(_) => false,
            };
            if candidate {
                found(at - prefixes, at);
            }
        }
        prefixes = if is_prefix(value) { (prefixes + 1).min(MAX_LEN - 1) } else { 0 };
    }
    if prefixes > 0 {
        // Prefixes at the end of the page: the opcode is on the next one.
        found(page.len() - prefixes, page.len() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_instructions_are_told_with_their_operands() {
        assert_eq!(decode(&[0x0f, 0x05]), Insn::System(System::Syscall, 2));
        assert_eq!(decode(&[0x0f, 0x22, 0xd8]), Insn::System(System::WriteCr { cr: 3, gpr: 0 }, 3));
        assert_eq!(decode(&[0x41, 0x0f, 0x22, 0xdf]), Insn::System(System::WriteCr { cr: 3, gpr: 15 }, 4));
        assert_eq!(decode(&[0x44, 0x0f, 0x22, 0xc0]), Insn::System(System::WriteCr { cr: 8, gpr: 0 }, 4));
        assert_eq!(decode(&[0x0f, 0x01, 0x3f]), Insn::System(System::DropsTranslations, 2));
        assert_eq!(decode(&[0x0f, 0x01, 0xf8]), Insn::SwapGs);
        assert_eq!(decode(&[0x0f, 0x01, 0xf9]), Insn::System(System::Rdtscp, 3));
        assert_eq!(decode(&[0xf3, 0xa4]), Insn::RepString);
        assert_eq!(decode(&[0xf3, 0x48, 0xa5]), Insn::RepString);
        assert_eq!(decode(&[0xa4]), Insn::Integer);
        assert_eq!(decode(&[0x8e, 0xd0]), Insn::InhibitsInterrupts, "mov ss, ax");
        assert_eq!(decode(&[0x8e, 0xd8]), Insn::Plain, "mov ds, ax");
        assert_eq!(decode(&[0x48, 0x0f]), Insn::Incomplete);
        assert_eq!(decode(&[0x66; 20]), Insn::Plain);
    }

    #[test]
    fn instructions_that_touch_more_than_integer_state_are_not_called_so() {
        for bytes in
            [&[0x55][..], &[0x48, 0x83, 0xec, 0x20], &[0xf3, 0x0f, 0x1e, 0xfa], &[0xc3], &[0xff, 0xd0], &[0xf0, 0x0f, 0xc1, 0x07]]
        {
            assert_eq!(decode(bytes), Insn::Integer, "{bytes:02x?}");
        }
        for bytes in [
            &[0x0f, 0x10, 0x07][..],
            &[0xd9, 0xe8],
            &[0xc5, 0xf8, 0x77],
            &[0xff, 0x2f],
            &[0x9b],
            &[0xcf],
            &[0x0f, 0xae, 0x07],
            &[0xe4, 0x60],
            &[0x9d],
        ] {
            assert_ne!(decode(bytes), Insn::Integer, "{bytes:02x?}");
        }
    }

    #[test]
    fn a_store_of_a_vector_is_told_from_one_of_its_parts() {
        for bytes in [
            &[0x0f, 0x11, 0x07][..],
            &[0x66, 0x0f, 0x29, 0x07],
            &[0x44, 0x0f, 0x2b, 0x07],
            &[0x66, 0x0f, 0x7f, 0x07],
            &[0xf3, 0x0f, 0x7f, 0x07],
            &[0x66, 0x0f, 0xe7, 0x07],
        ] {
            assert_eq!(decode(bytes), Insn::WideStore, "{bytes:02x?}");
        }
        // movss, movsd, movq from MMX, movntq, movlps.
        for bytes in [
            &[0xf3, 0x0f, 0x11, 0x07][..],
            &[0xf2, 0x0f, 0x11, 0x07],
            &[0x0f, 0x7f, 0x07],
            &[0x0f, 0xe7, 0x07],
            &[0x0f, 0x13, 0x07],
        ] {
            assert_eq!(decode(bytes), Insn::Plain, "{bytes:02x?}");
        }
    }

    #[test]
    fn a_scan_finds_what_decode_would_tell_and_what_the_page_cuts_off() {
        let mut page = [0x90; 64];
        page[10..13].copy_from_slice(&[0x41, 0x0f, 0x22]);
        page[13] = 0xdf;
        page[62] = 0x48;
        page[63] = 0x0f;
        let mut ranges = Vec::new();
        scan(&page, |first, last| ranges.push((first, last)));
        assert_eq!(ranges, [(10, 11), (62, 63)]);
    }
}
