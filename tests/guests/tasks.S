/*
 * Three tasks of vCPU 0, switched by the timer and nothing else; the third is a jump to itself. Other vCPUs count and take an interrupt
 * from vCPU 0 each. It ends after `ticks` timer interrupts (command line, default 30).
 */
#define HAS_AP_MAIN
#include "boot.inc"

#define TIMER 0x40
#define CALL 0x50

counter ticks
counter work_a
counter work_b
counter spins
counter ipis
counter ready
counter aps_done
counter wanted

	.text
	.global main, t_jump, t_work, t_tick
main:
	mov [rip + main_rsp], rsp
	lea rdi, [rip + name_ticks]
	mov eax, 30
	call parameter
	mov [rip + wanted], rax
	lea rax, [rip + on_timer]
	mov [rip + handlers + TIMER * 8], rax
	/* All others are there, then each gets one interrupt. */
	mov rax, [rip + boot_info]
	mov rbx, [rax + 24]
	dec rbx
1:	pause
	cmp [rip + ready], rbx
	jne 1b
	test rbx, rbx
	jz 3f
	mov ecx, X2APIC_ICR
	mov eax, 3 << 18 | CALL
	xor edx, edx
	wrmsr
2:	pause
	cmp [rip + ipis], rbx
	jne 2b
3:	lea rax, [rip + task_b]
	mov [rip + frames + 1 * 176 + FRAME_RIP], rax
	lea rax, [rip + task_c]
	mov [rip + frames + 2 * 176 + FRAME_RIP], rax
	mov ecx, 1
4:	imul rax, rcx, 176
	lea rdx, [rip + frames]
	add rdx, rax
	mov qword ptr [rdx + FRAME_CS], KCODE
	mov qword ptr [rdx + FRAME_SS], KDATA
	mov qword ptr [rdx + FRAME_RFLAGS], 0x202
	lea rax, [rip + task_stacks + 4096]
	mov r8d, ecx
	shl r8, 12
	add rax, r8
	mov [rdx + FRAME_RSP], rax
	inc ecx
	cmp ecx, 3
	jb 4b
	write_msr X2APIC_LVT_TIMER, (TIMER | 1 << 17)
	write_msr X2APIC_INITIAL_COUNT, 3000
	sti
task_a:
	inc qword ptr [rip + work_a]
	jmp task_a
task_b:
	mov ecx, 100
t_work:	inc qword ptr [rip + work_b]
	dec ecx
	jnz t_work
	jmp task_b
task_c:
	inc qword ptr [rip + spins]
t_jump:	jmp t_jump

/* RDI = frame: saves it as the current task's and goes on with the next one. */
on_timer:
t_tick:	inc qword ptr [rip + ticks]
	mov ecx, X2APIC_EOI
	xor eax, eax
	xor edx, edx
	wrmsr
	mov rax, [rip + ticks]
	cmp rax, [rip + wanted]
	jae 1f
	mov rdx, rdi
	imul rax, [rip + current], 176
	lea rdi, [rip + frames]
	add rdi, rax
	mov rsi, rdx
	mov ecx, 22
	rep movsq
	mov rax, [rip + current]
	inc rax
	cmp rax, 3
	jb 2f
	xor eax, eax
2:	mov [rip + current], rax
	imul rax, rax, 176
	lea rsi, [rip + frames]
	add rsi, rax
	mov rdi, rdx
	mov ecx, 22
	rep movsq
	ret
/* Enough: back from `main`, with interrupts off. */
1:	write_msr X2APIC_INITIAL_COUNT, 0
	mov rsp, [rip + main_rsp]
	ret

ap_main:
	lea rax, [rip + on_call]
	mov [rip + handlers + CALL * 8], rax
	count ready
	sti
1:	hlt
	cmp qword ptr [called + rsi * 8], 0
	je 1b
	cli
	count aps_done
	ret

on_call:
	count ipis
	mov ecx, X2APIC_ID
	rdmsr
	lea rdx, [rip + called]
	mov qword ptr [rdx + rax * 8], 1
	mov ecx, X2APIC_EOI
	xor eax, eax
	xor edx, edx
	wrmsr
	ret

	.section .data
name_ticks: .asciz "ticks="
	.bss
	.balign 16
	.global called
called:	.skip 64
main_rsp: .quad 0
current: .quad 0
frames:	.skip 3 * 176
	.balign 4096
task_stacks: .skip 4 * 4096
	.text
