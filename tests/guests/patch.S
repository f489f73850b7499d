/*
 * Calls f_entry, and so f, `n` times (command line `n=`, default 100) and rewrites f's first eight bytes after each call, so that it returns the number
 * of the next one: code that overwrites a tapped byte itself. Counts results that are not the number, and keeps the last result.
 * The store is a `mov`; with `xchg=1` or `xadd=1` an instruction that reads the bytes first, locked; with `inside=1` a `mov` on the
 * page that it writes to, at patch_f.
 */
#define TAPPED_SIZE 4096
#include "boot.inc"

counter n
counter f_returned
counter wrong_results

	.text
	.global main
main:
	push rbp
	push r14
	push r15
	push r13
	lea rdi, [rip + name_n]
	mov eax, 100
	call parameter
	mov [rip + n], rax
	lea rdi, [rip + name_xchg]
	xor eax, eax
	call parameter
	mov r14, rax
	lea rdi, [rip + name_xadd]
	xor eax, eax
	call parameter
	mov r15, rax
	lea rdi, [rip + name_inside]
	xor eax, eax
	call parameter
	mov r13, rax
	xor ebp, ebp
1:	cmp rbp, [rip + n]
	jae 3f
	call f_entry
	mov [rip + f_returned], rax
	cmp rax, rbp
	je 2f
	count wrong_results
2:	inc rbp
	/* mov eax, rbp; ret; nop; nop */
	mov eax, ebp
	shl rax, 8
	mov rcx, 0x9090c300000000b8
	or rax, rcx
	test r14, r14
	jnz 4f
	test r15, r15
	jnz 5f
	test r13, r13
	jnz 6f
	mov [rip + f], rax
	jmp 1b
6:	call patch_f
	jmp 1b
4:	xchg [rip + f], rax
	jmp 1b
	/* The number is the only thing that changes, by one: in the second byte. */
5:	mov eax, 0x100
	lock xadd [rip + f], rax
	jmp 1b
3:	pop r13
	pop r15
	pop r14
	pop rbp
	ret

	.section .tapped, "ax"
	.balign 16
	.global f_entry, f
f_entry:
	nop
	.balign 16
f:	mov eax, 0
	ret
	nop
	nop
	.balign 16
	.global patch_f
patch_f:
	mov [rip + f], rax
	ret
	.org TAPPED_SIZE

	.section .data
name_n:	.asciz "n="
name_xchg: .asciz "xchg="
name_xadd: .asciz "xadd="
name_inside: .asciz "inside="
