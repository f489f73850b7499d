/*
 * Comes to `spot` in ring 3 with a value of its own in every register, those of tests/python/test_expressions.py, and on to the end.
 */
#include "boot.inc"

#define USER 0x10000000000

.macro wrmsr64 number, value
	mov ecx, \number
	mov rax, \value
	mov rdx, rax
	shr rdx, 32
	wrmsr
.endm

	.text
	.global main
main:
	lea rax, [rip + on_exit]
	mov [rip + handlers + 0x80 * 8], rax
	mov rdi, cr3
	mov rsi, USER
	mov rdx, offset PHYS(user_page)
	or rdx, 7
	call map_page
	/* Selectors that IRET leaves alone. */
	mov eax, UDATA
	mov fs, eax
	mov gs, eax
	wrmsr64 0xc0000100, 0xf500
	wrmsr64 0xc0000101, 0x6500
	wrmsr64 0xc0000102, 0xffff800000006600
	/* PWT, which tells CR3 from the root. */
	mov rax, cr3
	or rax, 8
	mov cr3, rax
	mov rax, 0xc2000
	mov cr2, rax
	mov [rip + kernel_rsp], rsp
	push UDATA
	push 0
	push 0xad7
	push UCODE
	mov rax, USER
	push rax
	iretq

/* int 0x80 from ring 3: back to `main`'s caller, in ring 0. */
on_exit:
	lea rax, [rip + 1f]
	mov [rdi + FRAME_RIP], rax
	mov qword ptr [rdi + FRAME_CS], KCODE
	mov qword ptr [rdi + FRAME_SS], KDATA
	mov rax, [rip + kernel_rsp]
	mov [rdi + FRAME_RSP], rax
1:	ret

	.section .user, "ax"
	.balign 4096
user_page:
	mov rax, 0x8000000000000001
	mov ebx, 0x102
	mov ecx, 0x103
	mov edx, 0x104
	mov esi, 0x105
	mov edi, 0x106
	mov esp, 0x107
	mov ebp, 0x108
	mov r8d, 0x109
	mov r9d, 0x10a
	mov r10d, 0x10b
	mov r11d, 0x10c
	mov r12d, 0x10d
	mov r13d, 0x10e
	mov r14d, 0x10f
	mov r15, -1
	.global spot
spot:	nop
	int 0x80
	.balign 4096

	.bss
kernel_rsp: .quad 0
	.text
