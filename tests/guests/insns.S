/*
 * Instructions that are hard to step over, each at a label `t_...`. All cases are run twice; what each leaves in RAX, RDX and RCX goes
 * to `results`. A run with breakpoints must leave all of the truth section, and what boot.inc recorded, as a run without.
 */
#define TAPPED_SIZE (4 * 4096)
#include "boot.inc"
#include "reads.inc"

#define USER 0x10000000000
#define ROUNDS 2

counter rounds
counter int3_seen
counter user_rcx
counter user_r11
counter user_flags
counter buffer

	.section .truth, "aw"
	.balign 8
	.global results, results_end
results:
	.skip 64 * 3 * ROUNDS * 8
results_end:

	.data 5
cases:
	.data 7
cases_end:

/* Begins the function of one case. */
.macro case name
	.data 6
	.quad c_\name
	.section .tapped, "ax"
c_\name:
	xor eax, eax
	xor edx, edx
	xor ecx, ecx
.endm

/* The instruction under the breakpoint. */
.macro tap name
	.global t_\name
t_\name:
.endm

	.text
	.global main
main:
	push rbp
	push r14
	push r15
	push rbx
	lea rax, [rip + on_int3]
	mov [rip + handlers + 3 * 8], rax
	lea rax, [rip + on_exit]
	mov [rip + handlers + 0x80 * 8], rax
	/* The user page, seen from ring 3. */
	mov rdi, cr3
	mov rsi, USER
	mov rdx, offset PHYS(user_page)
	or rdx, 7
	call map_page
	mov ecx, 0xc0000081
	xor eax, eax
	mov edx, (UDATA - 8) << 16 | KCODE
	wrmsr
	mov ecx, 0xc0000082
	lea rax, [rip + on_syscall]
	mov rdx, rax
	shr rdx, 32
	wrmsr
	write_msr 0xc0000084, 0x700
	call golden_reads
	lea r15, [rip + results]
1:	lea r14, [rip + cases]
2:	push r14
	push r15
	call [r14]
	pop r15
	pop r14
	mov [r15], rax
	mov [r15 + 8], rdx
	mov [r15 + 16], rcx
	add r15, 24
	add r14, 8
	lea rax, [rip + cases_end]
	cmp r14, rax
	jb 2b
	inc qword ptr [rip + rounds]
	cmp qword ptr [rip + rounds], ROUNDS
	jb 1b
	call check_reads
	pop rbx
	pop r15
	pop r14
	pop rbp
	ret

on_int3:
	count int3_seen
	ret

/* int 0x80 from ring 3: back to `leave_user`, in ring 0. */
on_exit:
	lea rax, [rip + leave_user]
	mov [rdi + FRAME_RIP], rax
	mov qword ptr [rdi + FRAME_CS], KCODE
	mov qword ptr [rdi + FRAME_SS], KDATA
	mov rax, [rip + kernel_rsp]
	mov [rdi + FRAME_RSP], rax
	ret
leave_user:
	ret

on_syscall:
	mov [rip + user_rcx], rcx
	mov [rip + user_r11], r11
	mov rsp, [rip + kernel_rsp]	/* ring 3 has no stack */
	pushfq
	pop qword ptr [rip + user_flags]
	jmp c_sysret

	.section .tapped, "ax"
	.global tapped_start, tapped_end
tapped_start:
	tap first
	mov eax, 7
	ret

case first
	jmp tapped_start

case nop
	tap nop
	nop
	ret

case page_fault
	expect 1f
	mov rdi, 0x7f0000000abc
	tap page_fault
	mov rax, [rdi]
	ud2
1:	ret

case page_fault_write
	expect 1f
	mov rdi, 0x7f0000000abc
	tap page_fault_write
	mov byte ptr [rdi], 1
	ud2
1:	ret

case non_canonical
	expect 1f
	mov rdi, 0x8000000000000000
	tap non_canonical
	mov rax, [rdi]
	ud2
1:	ret

case div
	expect 1f
	mov eax, 5
	xor edx, edx
	xor ecx, ecx
	tap div
	div ecx
	ud2
1:	ret

case ud2
	expect 1f
	tap ud2
	ud2
1:	ret

case rep_movsb
	lea rsi, [rip + tapped_start]
	lea rdi, [rip + copy]
	mov ecx, 5000
	tap rep_movsb
	rep movsb
	mov rax, [rip + copy + 4992]
	ret

case rep_stos
	lea rdi, [rip + copy]
	mov ecx, 700
	mov eax, 0x1234
	tap rep_stos
	rep stosq
	mov rax, [rip + copy + 5592]
	ret

case repe_cmpsb
	lea rsi, [rip + tapped_start]
	lea rdi, [rip + first_copy]
	mov ecx, 300
	tap repe_cmpsb
	repe cmpsb
	pushfq
	pop rax
	ret

case rep_zero
	xor ecx, ecx
	tap rep_zero
	rep movsb
	mov eax, 3
	ret

case pushfq
	cmp eax, 1
	tap pushfq
	pushfq
	pop rax
	ret

case popfq
	push 0xad7
	tap popfq
	popfq
	pushfq
	pop rax
	cld
	ret

case mov_ss
	mov eax, KDATA
	tap mov_ss
	mov ss, eax
	mov rcx, rsp
	ret

case pop_fs
	push KDATA
	tap pop_fs
	pop fs
	mov eax, fs
	ret

case sti
	tap sti
	sti
	nop
	pushfq
	pop rax
	cli
	ret

case cli
	sti
	nop
	tap cli
	cli
	pushfq
	pop rax
	ret

case int3
	tap int3
	int3
	mov rax, [rip + int3_seen]
	ret

case int3_long
	tap int3_long
	.byte 0xcd, 3
	mov rax, [rip + int3_seen]
	ret

case int80
	lea rax, [rip + 1f]
	mov [rip + kernel_rsp], rsp
	tap int80
	int 0x80
1:	ud2

case call
	tap call
	call 1f
	ret
1:	mov eax, 11
	tap ret
	ret

case indirect
	lea rcx, [rip + 1f]
	tap indirect
	jmp rcx
	ud2
1:	xor ecx, ecx
	mov eax, 12
	ret

case branch
	mov ecx, 3
	tap loop
1:	inc eax
	dec ecx
	tap branch
	jnz 1b
	ret

case movups
	tap movups
	movups xmm1, [rip + tapped_start]
	movq rax, xmm1
	ret

case xmm_add
	mov eax, 40
	movq xmm2, rax
	movq xmm3, rax
	tap paddq
	paddq xmm2, xmm3
	tap movq
	movq rax, xmm2
	ret

case x87
	fld1
	fld1
	tap fadd
	faddp
	fistp qword ptr [rip + buffer]
	mov rax, [rip + buffer]
	ret

case lock
	mov qword ptr [rip + buffer], 5
	mov edx, 4
	tap lock_xadd
	lock xadd [rip + buffer], rdx
	mov rax, [rip + buffer]
	ret

case self_read
	tap self_read
	mov rax, [rip + t_self_read]
	ret

case cpuid
	xor eax, eax
	push rbx
	tap cpuid
	cpuid
	pop rbx
	ret

case rdmsr
	mov ecx, 0xc0000082
	tap rdmsr
	rdmsr
	ret

case wrmsr
	mov ecx, 0xc0000102
	mov eax, 0x1234
	xor edx, edx
	tap wrmsr
	wrmsr
	xor eax, eax
	rdmsr
	ret

case write_cr3
	mov rax, cr3
	tap write_cr3
	mov cr3, rax
	ret

case write_cr4
	mov rax, cr4
	or rax, 4
	tap write_cr4
	mov cr4, rax
	xor rax, 4
	mov cr4, rax
	mov rax, cr4
	ret

case invlpg
	tap invlpg
	invlpg [rip + buffer]
	ret

case swapgs
	tap swapgs
	swapgs
	swapgs
	ret

case lidt
	tap lidt
	lidt [rip + idtr]
	ret

case enter
	push rbp
	tap enter
	enter 16, 0
	mov rax, rsp
	tap leave
	leave
	pop rbp
	ret

case out
	mov al, '.'
	tap out
	out 0xe9, al
	tap in
	in al, 0xe9
	ret

case segment
	mov ecx, 0xc0000100
	lea rax, [rip + buffer]
	mov rdx, rax
	shr rdx, 32
	wrmsr
	mov qword ptr [rip + buffer], 77
	tap fs_load
	mov rax, fs:[0]
	ret

/* To ring 3, with a system call, an INT3 and a fault of its own there, and back with int 0x80. */
case user
	mov [rip + kernel_rsp], rsp
	push UDATA
	push 0
	push 0x202
	push UCODE
	mov rax, USER
	push rax
	xor eax, eax
	tap iretq
	iretq
c_sysret:
	tap sysretq
	sysretq

	.balign 4096
	.skip 4095 - 12
/* The last byte of a page, and an instruction that crosses the border. */
case last
	jmp 1f
	.org 2 * 4096 - 1
	tap last
1:	nop
	mov eax, 9
	ret

	.org 3 * 4096 - 16
case cross
	.fill 8, 1, 0x90
	tap cross
	mov eax, 0x1234
	ret
	.org TAPPED_SIZE
tapped_end:

	.section .user, "ax"
	.balign 4096
user_page:
	mov eax, 5
	tap syscall
	syscall
	tap user_int3
	int3
	tap user_nop
	nop
	mov ecx, 1
	tap user_out
	int 0x80
	.balign 4096

	.bss
kernel_rsp: .quad 0
	.text
