/*
 * Patches its own code the way kernels do, `n` rounds (command line `n=`, default 20): an INT3 over the first byte, then the tail, then the first
 * byte, each through another mapping of the page and each followed by a handshake with the second vCPU, where there is one, which calls the
 * code all the time. The instruction, `mov eax, imm32`, lies across a page border. Every third round writes it at once instead, with bytes
 * before and behind it that stay. The handler of INT3 carries out the instruction to come.
 * Then a code generator: a function is written anew through the other mapping, in every second round by the second vCPU, and called.
 * `site_calls` and `jit_calls` count what is called, `wrong` results that are none of those allowed, `unlike` bytes that are not what was written.
 */
#define TAPPED_SIZE (3 * 4096)
#define HAS_AP_MAIN
#include "boot.inc"

counter n
counter site_calls
counter jit_calls
counter int3_calls
counter wrong
counter unlike
counter old_value
counter new_value
counter epoch
counter seen
counter asked
counter answered

#define BP 3

/* Calls the site: EAX must be the old or the new value. */
.macro check_site
	call site
	count site_calls
	/* In this order: the old one is changed first. */
	cmp eax, [rip + new_value]
	je ok_\@
	cmp eax, [rip + old_value]
	je ok_\@
	count wrong
ok_\@:
.endm

	.text
	.global main
main:
	push rbx
	push r12
	push r13
	push r14
	lea rdi, [rip + name_n]
	mov eax, 20
	call parameter
	mov [rip + n], rax
	lea rax, [rip + on_int3]
	mov [rip + handlers + BP * 8], rax
	mov rax, [rip + boot_info]
	mov r14, [rax + 24]
	/* The low addresses are the physical ones. */
	mov r12, offset site - KBASE
	mov r13, offset jit - KBASE
	xor ebx, ebx
1:	mov rax, [rip + new_value]
	mov [rip + old_value], rax
	inc ebx
	lea eax, [rbx + 1000]
	mov [rip + new_value], rax
	mov eax, ebx
	xor edx, edx
	mov ecx, 3
	div ecx
	test edx, edx
	jz 2f
	mov byte ptr [r12], 0xcc
	call sync
	check_site
	mov eax, [rip + new_value]
	mov [r12 + 1], eax
	call sync
	check_site
	mov byte ptr [r12], 0xb8
	jmp 3f
	/* One byte before it, and two behind it. */
2:	mov eax, [rip + new_value]
	shl rax, 16
	mov rcx, 0x90c300000000b890
	or rax, rcx
	mov [r12 - 1], rax
3:	call sync
	call site
	count site_calls
	cmp eax, [rip + new_value]
	je 4f
	count wrong
4:	mov eax, [rip + site + 1]
	cmp eax, [rip + new_value]
	jne 5f
	cmp eax, [r12 + 1]
	jne 5f
	cmp byte ptr [rip + site], 0xb8
	jne 5f
	cmp byte ptr [r12], 0xb8
	je 6f
5:	count unlike
6:	cmp rbx, [rip + n]
	jb 1b

	/* The code generator. */
	xor ebx, ebx
1:	inc ebx
	test ebx, 1
	jz 2f
	cmp r14, 1
	je 2f
	mov [rip + asked], rbx
3:	pause
	cmp [rip + answered], rbx
	jne 3b
	jmp 4f
2:	mov edi, ebx
	call generate
4:	call jit
	count jit_calls
	cmp eax, ebx
	je 5f
	count wrong
5:	cmp rbx, [rip + n]
	jb 1b
	pop r14
	pop r13
	pop r12
	pop rbx
	ret

/* Writes the function that returns EDI. */
generate:
	mov [rip + template + 1], edi
	lea rsi, [rip + template]
	mov rdi, offset jit - KBASE
	mov ecx, 6
	rep movsb
	ret

/* The other vCPU has come by since. */
sync:
	cmp r14, 1
	je 2f
	inc qword ptr [rip + epoch]
	mov rax, [rip + epoch]
1:	pause
	cmp [rip + seen], rax
	jb 1b
2:	ret

/* RDI = the frame. */
on_int3:
	lock inc qword ptr [rip + int3_calls]
	mov rax, offset site + 1
	cmp [rdi + FRAME_RIP], rax
	je 1f
	count wrong
1:	mov eax, [rip + new_value]
	mov [rdi + FRAME_RAX], rax
	add qword ptr [rdi + FRAME_RIP], 4
	ret

ap_main:
	push rbx
1:	mov rbx, [rip + epoch]
	check_site
	mov [rip + seen], rbx
	mov rax, [rip + asked]
	cmp rax, [rip + answered]
	je 2f
	mov edi, eax
	call generate
	mov rax, [rip + asked]
	mov [rip + answered], rax
2:	cmp qword ptr [rip + done], 0
	je 1b
	pop rbx
	ret

	.section .tapped, "ax"
	.global site, site_ret, jit, pad, jit_ret
	.org 4093
pad:	nop
site:	mov eax, 0
site_ret:
	ret
	nop
	.org 8192
	.skip 64
jit:	mov eax, 0
jit_ret:
	ret
	.org TAPPED_SIZE

	.section .data
name_n:	.asciz "n="
template:
	mov eax, 0
	ret
