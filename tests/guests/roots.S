/*
 * Calls f under one root after the other; each is given up and its pages are used for something else. Rounds: command line `n=`, default 6.
 * `user` is in the lower half, on another frame under each root: only mapped once the root is in use.
 */
#define TAPPED_SIZE 4096
#include "boot.inc"

#define USER 0x8000000040
#define AT 0x40
#define FRAMES 0x200000

counter n
counter f_calls
counter user_calls
counter ran_user
counter wrong
counter mismatches
counter reused

	.text
	.global main
main:
	push rbx
	push r12
	push r13
	lea rdi, [rip + name_n]
	mov eax, 6
	call parameter
	mov [rip + n], rax
	xor ebx, ebx
	/* The root before. */
	mov r12, cr3
	and r12, -4096
1:	call new_root
	mov r13, rax
	mov cr3, rax
	call f
	count f_calls
	/* A frame of its own for USER, through tables of its own. */
	mov r8d, ebx
	shl r8d, 12
	add r8d, FRAMES
	push r8
	lea rsi, [rip + body]
	lea rdi, [r8 + AT]
	mov ecx, offset body_end - body
	rep movsb
	pop rdx
	or rdx, 7
	mov rdi, r13
	movabs rsi, USER
	call map_page
	movabs rax, USER
	call rax
	count user_calls
	call f
	count f_calls
	/* The root before is a page like any other now. */
	mov rdi, r12
	xor eax, eax
	mov ecx, 512
	rep stosq
	mov ecx, 1000
2:	mov [r12 + rcx], rcx
	count reused
	dec ecx
	jnz 2b
	call f
	count f_calls
	mov r12, r13
	inc ebx
	cmp rbx, [rip + n]
	jb 1b
	mov rax, [rip + ran_user]
	cmp rax, [rip + user_calls]
	je 3f
	count wrong
3:	pop r13
	pop r12
	pop rbx
	ret

	.section .tapped, "ax"
	.global f
f:	nop
	ret
	.org TAPPED_SIZE

	.section .data
name_n:	.asciz "n="
body:	movabs rax, offset ran_user
	lock inc qword ptr [rax]
	ret
body_end:
