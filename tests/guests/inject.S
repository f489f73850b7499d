/*
 * Each vCPU comes to `spot` (vCPU 0) or `ap_spot` (the others) ROUNDS times. Whatever interrupts it is counted by boot.inc, with the number
 * of the vCPU that took it last, and the interrupted code goes on where it was.
 */
#define HAS_AP_MAIN
#include "boot.inc"

#define ROUNDS 10

counter rounds
counter ap_rounds
counter taken
counter taken_by
counter rflags_after

	.text
	.global main, ap_main, spot, ap_spot
main:
	lea rdi, [rip + handlers]
	lea rax, [rip + on_any]
	mov ecx, 256
	rep stosq
	sti
1:	stc
spot:	xchg ax, ax		/* two bytes, whose second is a NOP */
	pushfq
	pop [rip + rflags_after]
	inc qword ptr [rip + rounds]
	cmp qword ptr [rip + rounds], ROUNDS
	jb 1b
	cli
	ret

on_any:
	count taken
	mov ecx, X2APIC_ID
	rdmsr
	mov [rip + taken_by], rax
	ret

ap_main:
	sti
1:	pause
ap_spot:
	nop
	inc qword ptr [rip + ap_rounds]
	cmp qword ptr [rip + ap_rounds], ROUNDS
	jb 1b
	cli
	ret
