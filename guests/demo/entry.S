/* Where the processor comes into the kernel: start, traps, SYSCALL; and the few things C cannot say. */
#include "pvh.S"

#define FRAME_CS 144
#define KSTACK_SIZE 8192
#define USER_DATA 0x1b
#define USER_CODE 0x23

	.section .text, "ax"
	.global _start
	.type _start, @function
/* RDI = boot info (physical), RSI = vCPU index. The boot tables are in force: both windows are there. */
_start:
	cld
	lea rcx, [rsi + 1]
	imul rcx, rcx, KSTACK_SIZE
	lea rsp, [rcx + boot_stacks]
	xor ebp, ebp
	test rsi, rsi
	jz kernel_main
1:	pause
	cmp qword ptr [rip + others_may_start], 0
	je 1b
	mov rax, [rip + kernel_root]
	mov cr3, rax
	mov rdi, rsi
	jmp other_main

	.global halt_forever
halt_forever:
	cli
	hlt
	jmp halt_forever

	.macro save_registers
	push rax
	push rbx
	push rcx
	push rdx
	push rsi
	push rdi
	push rbp
	push r8
	push r9
	push r10
	push r11
	push r12
	push r13
	push r14
	push r15
	.endm

	.macro restore_registers
	pop r15
	pop r14
	pop r13
	pop r12
	pop r11
	pop r10
	pop r9
	pop r8
	pop rbp
	pop rdi
	pop rsi
	pop rdx
	pop rcx
	pop rbx
	pop rax
	.endm

	.macro trap vector
trap_\vector:
	.if (\vector == 8) || (\vector >= 10 && \vector <= 14) || (\vector == 17) || (\vector == 21)
	.else
	push 0
	.endif
	push \vector
	jmp trap_common
	.section .rodata
	.quad trap_\vector
	.text
	.endm

	.section .rodata
	.balign 8
	.global trap_stubs
trap_stubs:
	.text
	.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21
	trap \vector
	.endr
	trap 64
	trap 65
	trap 255

trap_common:
	save_registers
	test byte ptr [rsp + FRAME_CS], 3
	jz 1f
	swapgs
1:	cld
	mov rdi, rsp
	call trap_handler

	.global trap_return
trap_return:
	test byte ptr [rsp + FRAME_CS], 3
	jz 1f
	swapgs
1:	restore_registers
	add rsp, 16
	.global trap_iret
trap_iret:
	iretq

	.global syscall_entry
syscall_entry:
	swapgs
	mov gs:[16], rsp
	mov rsp, gs:[8]
	push USER_DATA
	push gs:[16]
	push r11
	push USER_CODE
	push rcx
	push 0
	push 256
	save_registers
	mov rdi, rsp
	call syscall_handler
	restore_registers
	add rsp, 16
	pop rcx
	add rsp, 8
	pop r11
	pop rsp
	swapgs
	.global syscall_return
syscall_return:
	sysretq

/* void switch_stack(u64 *save, u64 load, u64 root) */
	.global switch_stack
switch_stack:
	push rbx
	push rbp
	push r12
	push r13
	push r14
	push r15
	mov [rdi], rsp
	mov rax, cr3
	cmp rax, rdx
	je 1f
	mov cr3, rdx
1:	mov rsp, rsi
	pop r15
	pop r14
	pop r13
	pop r12
	pop rbp
	pop rbx
	ret

/* u64 copy_user(void *to, const void *from, u64 n): how many bytes could not be copied. */
	.global copy_user, copy_user_move
copy_user:
	mov rcx, rdx
copy_user_move:
	rep movsb
copy_user_out:
	mov rax, rcx
	ret

/* long copy_user_string(char *to, const char *from, u64 limit): its length, or -1 if it cannot be read or is too long. */
	.global copy_user_string, copy_user_load
copy_user_string:
	xor ecx, ecx
1:	cmp rcx, rdx
	jae copy_user_string_bad
copy_user_load:
	mov al, [rsi + rcx]
	mov [rdi + rcx], al
	test al, al
	jz 2f
	inc rcx
	jmp 1b
2:	mov rax, rcx
	ret
copy_user_string_bad:
	mov rax, -1
	ret

	.section .rodata
	.balign 8
/* Instructions that may fault on a user's pointer, and where to go on. */
	.global exception_table, exception_table_end
exception_table:
	.quad copy_user_move, copy_user_out
	.quad copy_user_load, copy_user_string_bad
exception_table_end:

	.section .data
	.balign 8
	.global others_may_start
others_may_start:
	.quad 0

	.section .bss
	.balign 4096
boot_stacks:
	.skip 8 * KSTACK_SIZE

	.section .note.GNU-stack, "", @progbits
