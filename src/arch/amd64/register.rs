//! Registers by name, and facts of them: what a filter or a column can look at.

use super::registers::Registers;

macro_rules! registers {
    ($($variant:ident $name:literal => |$r:ident| $value:expr;)+) => {
        /// A register, or a fact of one, that a program can look at.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[expect(missing_docs, reason = "the names are the registers'")]
        pub enum Register {
            $($variant,)+
        }

        impl Register {
            /// Every register.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its name, in small letters.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// Its value.
            #[inline]
            pub fn of(self, registers: &Registers) -> u64 {
                match self {
                    $(Self::$variant => {
                        let $r = registers;
                        $value
                    })+
                }
            }
        }
    };
}

registers! {
    Rax "rax" => |r| r.gp.rax;
    Rbx "rbx" => |r| r.gp.rbx;
    Rcx "rcx" => |r| r.gp.rcx;
    Rdx "rdx" => |r| r.gp.rdx;
    Rsi "rsi" => |r| r.gp.rsi;
    Rdi "rdi" => |r| r.gp.rdi;
    Rsp "rsp" => |r| r.gp.rsp;
    Rbp "rbp" => |r| r.gp.rbp;
    R8 "r8" => |r| r.gp.r8;
    R9 "r9" => |r| r.gp.r9;
    R10 "r10" => |r| r.gp.r10;
    R11 "r11" => |r| r.gp.r11;
    R12 "r12" => |r| r.gp.r12;
    R13 "r13" => |r| r.gp.r13;
    R14 "r14" => |r| r.gp.r14;
    R15 "r15" => |r| r.gp.r15;
    Rip "rip" => |r| r.gp.rip;
    Rflags "rflags" => |r| r.gp.rflags;
    Cr0 "cr0" => |r| r.cr0;
    Cr2 "cr2" => |r| r.cr2;
    Cr3 "cr3" => |r| r.cr3;
    Cr4 "cr4" => |r| r.cr4;
    Efer "efer" => |r| r.efer;
    Cs "cs" => |r| r.cs.selector.into();
    Ss "ss" => |r| r.ss.selector.into();
    FsBase "fs_base" => |r| r.fs.base;
    GsBase "gs_base" => |r| r.gs.base;
    KernelGsBase "kernel_gs_base" => |r| r.kernel_gs_base;
    Root "root" => |r| r.root().0;
    Ring "ring" => |r| r.cpl().into();
}

impl Register {
    /// The register of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|register| register.name() == name)
    }
}
