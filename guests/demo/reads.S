/* The kinds of read that C cannot say. RDI = address, RSI = bytes. */
	.intel_syntax noprefix
	.text

	.macro fnv value
	xor rax, \value
	imul rax, r9
	.endm

/* u64 hash_xadd(void *text, u64 n): text must be writable. */
	.global hash_xadd
hash_xadd:
	mov rax, 0xcbf29ce484222325
	mov r9, 0x100000001b3
	lea rcx, [rdi + rsi]
1:	xor edx, edx
	lock xadd [rdi], rdx
	fnv rdx
	add rdi, 8
	cmp rdi, rcx
	jb 1b
	ret

/* u64 hash_movups(const void *text, u64 n). XMM0 is nobody's: neither the kernel nor the user programs use SSE otherwise. */
	.global hash_movups
hash_movups:
	mov rax, 0xcbf29ce484222325
	mov r9, 0x100000001b3
	lea rcx, [rdi + rsi - 16]
	add rdi, 8
1:	movups xmm0, [rdi]
	movq rdx, xmm0
	fnv rdx
	psrldq xmm0, 8
	movq rdx, xmm0
	fnv rdx
	add rdi, 16
	cmp rdi, rcx
	jbe 1b
	ret

/* u64 count_equal(const void *text, u64 n, const void *copy) */
	.global count_equal
count_equal:
	mov rcx, rsi
	mov rax, rsi
	mov rsi, rdx
	repe cmpsb
	je 1f
	sub rax, rcx
	dec rax
1:	ret

/* u64 count_int3(const void *text, u64 n) */
	.global count_int3
count_int3:
	mov rcx, rsi
	xor edx, edx
	mov al, 0xcc
1:	jrcxz 3f
	repne scasb
	jne 3f
	inc rdx
	jmp 1b
3:	mov rax, rdx
	ret

	.section .rodata
	.balign 8
/* The linker is told these values once the text is final (build.rs); they must not be in the text itself. */
	.global golden_table
golden_table:
	.quad golden_byte, golden_aligned, golden_unaligned, golden_crossing
	.quad golden_aligned, golden_aligned, golden_aligned, golden_movups, 0, golden_scan

	.section .note.GNU-stack, "", @progbits
