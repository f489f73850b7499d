/*
 * Writes to the page of a function, `n` rounds each (command line `n=`, default 10). `patched` is `mov eax, imm32; ret`, and every way
 * of changing it is followed by a call that must give what was written last.
 * A second vCPU, where there is one, writes a byte of the page that is no code, and changes `other` when it is asked to.
 */
#define TAPPED_SIZE (2 * 4096)
#define HAS_AP_MAIN
#include "boot.inc"
#include "reads.inc"

counter calls
counter wrong
counter ap_writes
counter asked
counter answered
counter overwritten
counter reread

	.text
	.global main
main:
	push rbp
	push rbx
	push r14
	lea rdi, [rip + name_n]
	mov eax, 10
	call parameter
	mov r14, rax
	xor ebx, ebx
1:	inc ebx
	/* The operand behind the opcode, four bytes. */
	mov [rip + patched + 1], ebx
	call check_patched
	/* One byte of it, by a locked instruction. */
	add ebx, 0x10
	mov [rip + patched + 1], ebx
	lock xor byte ptr [rip + patched + 1], 0
	call check_patched
	/* Opcode and operand at once: the tapped byte is overwritten with what it is. */
	add ebx, 0x100
	mov eax, ebx
	shl rax, 8
	or rax, 0xb8
	mov rdx, 0x9090c30000000000
	or rax, rdx
	mov [rip + patched], rax
	call check_patched
	/* All of it by a string instruction. */
	add ebx, 0x1000
	mov [rip + template + 1], ebx
	lea rsi, [rip + template]
	lea rdi, [rip + patched]
	mov ecx, 6
	rep movsb
	call check_patched
	/* By a wide store. */
	add ebx, 0x10000
	mov [rip + template + 1], ebx
	movups xmm0, [rip + template]
	movups [rip + patched], xmm0
	call check_patched
	/* The tapped opcode becomes another: push imm32; pop rax; ret. */
	lea rsi, [rip + template2]
	lea rdi, [rip + patched]
	mov ecx, 8
	rep movsb
	mov eax, 0x1234567
	call check_value
	lea rsi, [rip + template]
	lea rdi, [rip + patched]
	mov ecx, 8
	rep movsb
	call check_patched
	/* By another vCPU. */
	mov rax, [rip + boot_info]
	cmp qword ptr [rax + 24], 1
	je 3f
	inc qword ptr [rip + asked]
2:	pause
	mov rax, [rip + asked]
	cmp rax, [rip + answered]
	jne 2b
	add ebx, 0x100000
	call check_patched
	/* A store that overwrites what follows right behind it. */
3:	call self_modifying
	cmp eax, 2
	je 4f
	count wrong
4:	inc qword ptr [rip + overwritten]
	/* What was written is what is read. */
	mov eax, [rip + patched + 1]
	cmp eax, ebx
	jne 5f
	cmp byte ptr [rip + patched], 0xb8
	jne 5f
	inc qword ptr [rip + reread]
5:	dec r14
	jnz 1b
	pop r14
	pop rbx
	pop rbp
	ret

check_patched:
	mov eax, ebx
check_value:
	push rax
	call patched
	pop rcx
	inc qword ptr [rip + calls]
	cmp eax, ecx
	je 1f
	count wrong
1:	ret

ap_main:
	xor ebx, ebx
1:	pause
	cmp qword ptr [rip + done], 0
	jne 3f
	inc byte ptr [rip + data_byte]
	count ap_writes
	mov rax, [rip + asked]
	cmp rax, [rip + answered]
	je 1b
	add dword ptr [rip + patched + 1], 0x100000
	mov [rip + answered], rax
	jmp 1b
3:	ret

	.section .tapped, "ax"
	.global tapped_start, tapped_end, patched, self_modifying, data_byte
tapped_start:
patched:
	mov eax, 0
	ret
	.balign 16
self_modifying:
	mov byte ptr [rip + 1f + 1], 1
	mov byte ptr [rip + 1f + 1], 2
1:	mov eax, 1
	ret
	.balign 64
data_byte:
	.byte 0
	.org TAPPED_SIZE
tapped_end:

	.section .data
name_n:	.asciz "n="
	.balign 16
template:
	mov eax, 0
	ret
	.fill 10, 1, 0x90
template2:
	push 0x1234567
	pop rax
	ret
	.fill 9, 1, 0x90
