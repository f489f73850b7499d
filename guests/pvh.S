/*
 * PVH entry: lets an image written for the boot contract of docs/guests.md also start under a hypervisor's PVH loader.
 *
 * The loader (Xen's "PHYS32_ENTRY", public/elfnote.h and docs/misc/pvh.pandoc) enters pvh_start in 32-bit protected mode without
 * paging, EBX = physical address of struct hvm_start_info. What the contract promises is made here, then `_start` is entered as
 * the embedded driver enters it. The word `vcpus=N` on the command line starts N-1 more processors by INIT and start-up IPI;
 * they are numbered as they come.
 *
 * Included by a .S file of an image that is linked at KBASE + physical address.
 */
#define KBASE 0xffffffff80000000
#define PHYS(symbol) ((symbol) - KBASE)
#define PVH_MAX_VCPUS 8
/* Where the 16-bit code of the other processors goes: any free page below 1 MiB. */
#define PVH_TRAMPOLINE 0x8000

	.intel_syntax noprefix

	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 8, 18			/* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad PHYS(pvh_start)

	.section .pvh.text, "ax", @progbits
	.code32
	.global pvh_start
pvh_start:
	cld
	cli
	/* No interrupts but the local APIC's: the 8259s are masked, where there are any. */
	mov al, 0xff
	out 0x21, al
	out 0xa1, al
	/* Four page directories of 2 MiB pages: the low 4 GiB, one to one. */
	mov edi, offset PHYS(pvh_pd)
	mov eax, 0x83
	mov ecx, 2048
1:	mov [edi], eax
	mov dword ptr [edi + 4], 0
	add eax, 0x200000
	add edi, 8
	dec ecx
	jnz 1b
	mov eax, offset PHYS(pvh_pd) + 3
	mov edi, offset PHYS(pvh_pdpt_low)
	mov [edi], eax
	add eax, 0x1000
	mov [edi + 8], eax
	add eax, 0x1000
	mov [edi + 16], eax
	add eax, 0x1000
	mov [edi + 24], eax
	/* The kernel window: the first 2 GiB once more at KBASE. */
	mov edi, offset PHYS(pvh_pdpt_high)
	mov eax, offset PHYS(pvh_pd) + 3
	mov [edi + 510 * 8], eax
	add eax, 0x1000
	mov [edi + 511 * 8], eax
	mov edi, offset PHYS(pvh_pml4)
	mov eax, offset PHYS(pvh_pdpt_low) + 3
	mov [edi], eax
	mov eax, offset PHYS(pvh_pdpt_high) + 3
	mov [edi + 511 * 8], eax

	mov eax, 0x620			/* PAE, OSFXSR, OSXMMEXCPT */
	mov cr4, eax
	mov eax, offset PHYS(pvh_pml4)
	mov cr3, eax
	mov ecx, 0xc0000080		/* EFER */
	mov eax, 0x901			/* NXE, LME, SCE */
	xor edx, edx
	wrmsr
	mov eax, 0x80010033		/* PG, WP, NE, ET, MP, PE */
	mov cr0, eax
	lgdt [PHYS(pvh_gdtr)]
	ljmp 0x08, offset PHYS(pvh_long)

	.code64
pvh_long:
	mov eax, 0x10
	mov ds, eax
	mov es, eax
	mov fs, eax
	mov gs, eax
	mov ss, eax
	mov esp, offset PHYS(pvh_stacks) + 0x1000
	call pvh_enable_x2apic
	mov ebx, ebx			/* hvm_start_info; the upper half of RBX is undefined after the mode switch */

	mov edi, offset PHYS(pvh_info)
	mov rax, 0x7061746d76		/* "vmtap" */
	mov [rdi], rax
	mov qword ptr [rdi + 8], 1
	/* Memory ends where the highest usable range below 4 GiB ends. */
	mov rsi, [rbx + 40]		/* memmap_paddr */
	mov ecx, [rbx + 48]		/* memmap_entries */
	xor edx, edx
	jrcxz 3f
1:	cmp dword ptr [rsi + 16], 1	/* type: RAM */
	jne 2f
	mov rax, [rsi]
	add rax, [rsi + 8]
	mov r8, rax
	shr r8, 32
	jnz 2f
	cmp rax, rdx
	cmova rdx, rax
2:	add rsi, 24
	dec ecx
	jnz 1b
3:	mov [rdi + 16], rdx
	mov rax, [rbx + 24]		/* cmdline_paddr */
	test rax, rax
	jnz 4f
	mov eax, offset PHYS(pvh_empty)
4:	mov [rdi + 32], rax

	/* vcpus=N, one digit. */
	mov r12d, 1
	mov rsi, rax
	mov rdx, 0x3d7375706376		/* "vcpus=" */
	mov r9, 0xffffffffffff
5:	cmp byte ptr [rsi], 0
	je 6f
	mov rax, [rsi]
	inc rsi
	and rax, r9
	cmp rax, rdx
	jne 5b
	movzx r12d, byte ptr [rsi + 5]
	sub r12d, '0'
	mov eax, 1
	cmp r12d, PVH_MAX_VCPUS
	cmova r12d, eax
	test r12d, r12d
	cmovz r12d, eax
6:	mov [rdi + 24], r12
	cmp r12d, 1
	je 9f

	mov esi, offset PHYS(pvh_ap16)
	mov edi, PVH_TRAMPOLINE
	mov ecx, offset pvh_ap16_end - pvh_ap16
	rep movsb
	/* To all but self: which APIC ids the others have is the hypervisor's own business. */
	mov ecx, 0x830			/* ICR */
	xor edx, edx
	mov eax, 0xc4500		/* INIT, assert */
	wrmsr
	mov r8d, 200000		/* time for the INIT to arrive */
8:	pause
	dec r8d
	jnz 8b
	mov eax, 0xc4600 + (PVH_TRAMPOLINE >> 12)
	wrmsr
9:	xor esi, esi

	/* ESI = vCPU index. */
pvh_enter:
	mov eax, esi
	shl eax, 12
	lea esp, [rax + PHYS(pvh_stacks) + 0x1000]
	mov edi, offset PHYS(pvh_info)
	lidt [PHYS(pvh_no_idt)]
	xor eax, eax
	xor ecx, ecx
	xor edx, edx
	xor ebx, ebx
	xor ebp, ebp
	xor r8d, r8d
	xor r9d, r9d
	xor r10d, r10d
	xor r11d, r11d
	xor r12d, r12d
	xor r13d, r13d
	xor r14d, r14d
	xor r15d, r15d
	push offset _start
	ret

pvh_enable_x2apic:
	mov ecx, 0x1b			/* IA32_APIC_BASE */
	rdmsr
	or eax, 0x800			/* enabled; only then may x2APIC mode be entered (SDM 3A, 11.12.5) */
	wrmsr
	or eax, 0xc00
	wrmsr
	ret

	.code16
pvh_ap16:
	cli
	xor ax, ax
	mov ds, ax
	lgdt [PVH_TRAMPOLINE + pvh_ap16_gdtr - pvh_ap16]
	mov eax, 0x620
	mov cr4, eax
	mov eax, offset PHYS(pvh_pml4)
	mov cr3, eax
	mov ecx, 0xc0000080
	mov eax, 0x901
	xor edx, edx
	wrmsr
	mov eax, 0x80010033
	mov cr0, eax
	.byte 0x66, 0xea		/* ljmp 0x08:pvh_ap64, 32-bit offset */
	.long PHYS(pvh_ap64)
	.word 0x08
	.balign 4
pvh_ap16_gdtr:
	.word 3 * 8 - 1
	.long PHYS(pvh_gdt)
pvh_ap16_end:

	.code64
pvh_ap64:
	mov eax, 0x10
	mov ds, eax
	mov es, eax
	mov fs, eax
	mov gs, eax
	mov ss, eax
	lgdt [PHYS(pvh_gdtr)]
	/* All of them come here at once: no stack before each has a number. Those that `vcpus=` does not count stop here. */
	mov ecx, 0x1b
	rdmsr
	or eax, 0x800
	wrmsr
	or eax, 0xc00
	wrmsr
	mov esi, 1
	lock xadd [PHYS(pvh_started)], esi
	inc esi
	cmp esi, [PHYS(pvh_info) + 24]
	jb pvh_enter
1:	hlt
	jmp 1b

	.balign 8
	.global pvh_gdt
pvh_gdt:
	.quad 0
	.quad 0x00af9b000000ffff	/* 0x08: 64-bit code, ring 0 */
	.quad 0x00cf93000000ffff	/* 0x10: data, ring 0 */
pvh_gdtr:
	.word 3 * 8 - 1
	.quad PHYS(pvh_gdt)
pvh_no_idt:
	.word 0
	.quad 0
pvh_empty:
	.byte 0

	.section .pvh.bss, "aw", @nobits
	.balign 4096
pvh_pml4:
	.skip 4096
pvh_pdpt_low:
	.skip 4096
pvh_pdpt_high:
	.skip 4096
pvh_pd:
	.skip 4 * 4096
pvh_info:
	.skip 4096
pvh_started:				/* processors besides the first */
	.skip 4096
pvh_stacks:
	.skip PVH_MAX_VCPUS * 4096
