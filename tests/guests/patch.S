/*
 * Calls f `n` times (command line `n=`, default 100) and rewrites f's first eight bytes after each call, so that it returns the number
 * of the next one: code that overwrites a tapped byte itself. Counts results that are not the number, and keeps the last result.
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
	lea rdi, [rip + name_n]
	mov eax, 100
	call parameter
	mov [rip + n], rax
	xor ebp, ebp
1:	cmp rbp, [rip + n]
	jae 3f
	call f
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
	mov [rip + f], rax
	jmp 1b
3:	pop rbp
	ret

	.section .tapped, "ax"
	.balign 16
	.global f
f:	mov eax, 0
	ret
	nop
	nop
	.org TAPPED_SIZE

	.section .data
name_n:	.asciz "n="
