/*
 * One store through another mapping of two pages of code, then a call of that code. Where it begins is `at=` (bytes behind the code's first), and
 * how many bytes it is long `size=` (1, 2, 4, 8 or 16). With `rounds=` it is a string instruction of so many rounds, downwards with `back=1`.
 * With `by=1` the second vCPU does it.
 * What is stored is CLC, what is there is NOP, and the last byte is RET, so both pages are run through whatever was stored.
 */
#define TAPPED_SIZE (2 * 4096)
#define HAS_AP_MAIN
#include "boot.inc"

counter at
counter size
counter rounds
counter back
counter by
counter asked
counter answered
counter called

.macro option name
	lea rdi, [rip + name_\name]
	xor eax, eax
	call parameter
	mov [rip + \name], rax
.endm

	.text
	.global main
main:
	/* SSE. */
	mov rax, cr4
	or eax, 0x600
	mov cr4, rax
	option at
	option size
	option rounds
	option back
	option by
	cmp qword ptr [rip + by], 0
	jne 1f
	call store
	jmp 2f
1:	mov qword ptr [rip + asked], 1
3:	pause
	cmp qword ptr [rip + answered], 0
	je 3b
2:	call area
	count called
	ret

ap_main:
	mov rax, cr4
	or eax, 0x600
	mov cr4, rax
1:	cmp qword ptr [rip + done], 0
	jne 2f
	pause
	cmp qword ptr [rip + asked], 0
	je 1b
	call store
	mov qword ptr [rip + answered], 1
2:	ret

store:
	/* The low addresses are the physical ones. */
	mov rdi, offset area - KBASE
	add rdi, [rip + at]
	mov rax, 0xf8f8f8f8f8f8f8f8
	mov rdx, [rip + size]
	mov rcx, [rip + rounds]
	test rcx, rcx
	jz 2f
	cmp qword ptr [rip + back], 0
	je 1f
	std
1:	cmp edx, 1
	je 11f
	cmp edx, 2
	je 12f
	cmp edx, 4
	je 14f
	rep stosq
	cld
	ret
11:	rep stosb
	cld
	ret
12:	rep stosw
	cld
	ret
14:	rep stosd
	cld
	ret
2:	cmp edx, 1
	je 21f
	cmp edx, 2
	je 22f
	cmp edx, 4
	je 24f
	cmp edx, 8
	je 28f
	movq xmm0, rax
	punpcklqdq xmm0, xmm0
	movups [rdi], xmm0
	ret
21:	mov [rdi], al
	ret
22:	mov [rdi], ax
	ret
24:	mov [rdi], eax
	ret
28:	mov [rdi], rax
	ret

	.section .tapped, "ax"
	.global area
area:
	.fill TAPPED_SIZE - 1, 1, 0x90
	ret

	.section .data
name_at:	.asciz "at="
name_size:	.asciz "size="
name_rounds:	.asciz "rounds="
name_back:	.asciz "back="
name_by:	.asciz "by="
