/*
 * Calls f(i) `n` times (command line `n=`, default 1000), and reads the three pages around it in every way each `every` calls
 * (`every=`, default 100; 0: never) and once at the end. g's first instruction lies across two pages: its first byte is the last of f's.
 * h has its first instruction right behind f's, so that two breakpoints share a page and one instruction lies between.
 */
#define TAPPED_SIZE (3 * 4096)
#define HAS_AP_MAIN
#include "boot.inc"
#include "reads.inc"

counter n
counter f_count
counter f_sum
counter g_count
counter h_count
counter wrong_results
counter golden_done
counter ap_checks

	.text
	.global main
main:
	push rbp
	push r14
	push r15
	lea rdi, [rip + name_n]
	mov eax, 1000
	call parameter
	mov [rip + n], rax
	lea rdi, [rip + name_every]
	mov eax, 100
	call parameter
	mov r14, rax
	call golden_reads
	mov qword ptr [rip + golden_done], 1
	mov r15, r14
	xor ebp, ebp
1:	cmp rbp, [rip + n]
	jae 3f
	mov rdi, rbp
	call f
	/* f(i) = 3 * i + 1 */
	lea rcx, [rbp + rbp * 2 + 1]
	cmp rax, rcx
	je 2f
	count wrong_results
2:	inc rbp
	dec r15
	jnz 1b
	mov r15, r14
	call g
	call h
	call check_reads
	jmp 1b
3:	call g
	call h
	call check_reads
	pop r15
	pop r14
	pop rbp
	ret

/* Other vCPUs check all the time, until vCPU 0 is done. */
	.global ap_main
ap_main:
1:	pause
	cmp qword ptr [rip + golden_done], 0
	je 1b
2:	call check_reads
	count ap_checks
	mov ecx, 50000		/* leave the others some time */
3:	pause
	dec ecx
	jnz 3b
	cmp qword ptr [rip + done], 0
	je 2b
	ret

	.section .tapped, "ax"
	.global tapped_start, tapped_end, f, f_end, g, h
tapped_start:
	.fill 4096, 1, 0x90
f:	push rbx
	mov rbx, rdi
	add qword ptr [rip + f_sum], rdi
	inc qword ptr [rip + f_count]
	lea rax, [rbx + rbx * 2 + 1]
	pop rbx
	ret
f_end:
h:	inc qword ptr [rip + h_count]
	ret
	.org 4096 + 4095
g:	inc qword ptr [rip + g_count]
	ret
	.org TAPPED_SIZE
tapped_end:

	.section .data
name_n:	.asciz "n="
name_every: .asciz "every="
