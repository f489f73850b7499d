/*
 * Maps, unmaps and remaps the pages of functions in every way that a store can change a page table, and calls them: `made_*` counts the
 * calls that were carried out, by root and address, `ran_*` what they ran, `absent` those that ended in a page fault. Each function's bytes are
 * compared with what they should be after each call (`mismatches`), and what the tables hold is read back.
 * `ready` is called once the roots are known, `mark` after each phase with its number in EDI.
 * A second vCPU, where there is one, changes an entry when it is asked to.
 */
#define TAPPED_SIZE 4096
#define HAS_AP_MAIN
#include "boot.inc"

#define FRAME_A 0x200000
#define FRAME_B 0x201000
/* What BASE's page 5 is inside the 1 GiB page at 0. */
#define FRAME_E 0x205000
#define LARGE_C 0x400000
#define LARGE_D 0x600000
#define AT 0x40
#define BODY 15
/* Entry 1 of the root, 0 of the next table, 1 of the next. */
#define BASE 0x8000200000
#define TARGET (BASE + 0x5000 + AT)
#define FIRST (BASE + AT)
/* Entry 3 of t_pd, as a page directory under root 1 and as a page table under root 3. */
#define ROLE1 (0x8000600000 + AT)
#define ROLE3 (0x10000003000 + AT)
/* Entry 3 of root 1 is root 1: there t_pt is a page. */
#define SELF 0x18040001000
#define LARGE 0x80
#define PAT_LARGE 0x1000

counter root1
counter root2
counter root3
counter made_1
counter made_2
counter made_first
counter made_role1
counter made_role3
counter made_in_table
counter ran_a
counter ran_b
counter ran_c
counter ran_d
counter ran_e
counter ran_f
counter ran_g
counter absent
counter wrong
counter mismatches
counter asked
counter answered

.macro body counter
	movabs rax, offset \counter
	lock inc qword ptr [rax]
	ret
.endm

/* Copies a body to a physical address. */
.macro place name, address
	lea rsi, [rip + body_\name]
	mov edi, \address
	mov ecx, BODY
	rep movsb
.endm

/* Calls \va, where the body \name must be. */
.macro present va, made, name
	mov rbx, [rip + ran_\name]
	movabs rax, \va
	call rax
	count \made
	inc rbx
	cmp rbx, [rip + ran_\name]
	je ran_\@
	count wrong
ran_\@:	movabs rsi, \va
	lea rdi, [rip + body_\name]
	mov ecx, BODY
	repe cmpsb
	je same_\@
	count mismatches
same_\@:
.endm

/* Calls \va, where nothing is. */
.macro gone va
	expect gone_\@
	movabs rax, \va
	call rax
	count wrong
	jmp done_\@
gone_\@:
	add rsp, 8
	count absent
done_\@:
.endm

.macro flush va
	movabs rcx, \va
	invlpg [rcx]
.endm

/* \entry must hold \value; bits 5 and 6 aside. */
.macro holds entry, value
	mov rax, [rip + \entry]
	and rax, ~0x60
	movabs rcx, \value
	cmp rax, rcx
	je holds_\@
	count mismatches
holds_\@:
.endm

.macro put entry, value
	movabs rax, offset \value
	mov [rip + \entry], rax
.endm

.macro phase number
	mov edi, \number
	call mark
.endm

.macro under root
	mov rax, [rip + \root]
	mov cr3, rax
.endm

	.text
	.global main, ready, mark
ready:	ret
	.balign 16
mark:	ret

main:
	push rbx
	push r12
	call new_root
	mov [rip + root1], rax
	mov cr3, rax
	call new_root
	mov [rip + root2], rax
	call new_root
	mov [rip + root3], rax
	place a, FRAME_A + AT
	place b, FRAME_B + AT
	place c, LARGE_C + 0x5000 + AT
	place d, LARGE_D + 0x5000 + AT
	place e, FRAME_E + AT
	place f, LARGE_C + AT
	place g, LARGE_D + AT
	gone TARGET
	call ready
	gone TARGET
	phase 0

	/* From the bottom up: the last store, into the root, maps it. */
	put t_pt+40, FRAME_A+3
	put t_pd+8, PHYS(t_pt)+3
	put t_pdpt, PHYS(t_pd)+3
	gone TARGET
	mov r12, [rip + root1]
	movabs rax, offset PHYS(t_pdpt)+3
	mov [r12 + 8], rax
	mov rcx, [rip + root2]
	mov [rcx + 8], rax
	present TARGET, made_1, a
	phase 1

	/* To another frame and back. */
	put t_pt+40, FRAME_B+3
	flush TARGET
	present TARGET, made_1, b
	present TARGET, made_1, b
	put t_pt+40, FRAME_A+3
	flush TARGET
	present TARGET, made_1, a
	phase 2

	/* In halves; the upper one leads beyond memory. */
	mov dword ptr [rip + t_pt + 40], 0
	flush TARGET
	gone TARGET
	mov dword ptr [rip + t_pt + 40], FRAME_B+3
	present TARGET, made_1, b
	mov dword ptr [rip + t_pt + 44], 0x10
	flush TARGET
	gone TARGET
	mov dword ptr [rip + t_pt + 44], 0
	flush TARGET
	present TARGET, made_1, b
	holds t_pt+40, FRAME_B+3
	phase 3

	/* A byte, single bits, exchanges. */
	mov byte ptr [rip + t_pt + 40], 0
	flush TARGET
	gone TARGET
	lock or qword ptr [rip + t_pt + 40], 3
	present TARGET, made_1, b
	lock btr qword ptr [rip + t_pt + 40], 0
	flush TARGET
	gone TARGET
	bts qword ptr [rip + t_pt + 40], 0
	present TARGET, made_1, b
	mov eax, FRAME_A+3
	xchg [rip + t_pt + 40], rax
	flush TARGET
	present TARGET, made_1, a
	mov rax, [rip + t_pt + 40]
	mov ecx, FRAME_B+3
	lock cmpxchg [rip + t_pt + 40], rcx
	flush TARGET
	present TARGET, made_1, b
	mov eax, FRAME_A - FRAME_B
	movsxd rax, eax
	lock xadd [rip + t_pt + 40], rax
	flush TARGET
	present TARGET, made_1, a
	phase 4

	/* Wide stores that begin in the entry before. */
	movups xmm0, [rip + wide]
	movups [rip + t_pt + 36], xmm0
	flush TARGET
	present TARGET, made_1, b
	mov rax, 0
	mov [rip + t_pt + 37], rax
	flush TARGET
	gone TARGET
	movups [rip + t_pt + 36], xmm0
	present TARGET, made_1, b
	holds t_pt+40, FRAME_B+3
	put t_pt+40, 0
	flush TARGET
	gone TARGET
	/* One that begins on the page before and is made of many: XMM0 lies 160 bytes into it. */
	mov eax, FRAME_B+3
	movq xmm0, rax
	pslldq xmm0, 8
	fxsave64 [rip + t_pt - 128]
	present TARGET, made_1, b
	holds t_pt+40, FRAME_B+3
	put t_pt+40, 0
	flush TARGET
	gone TARGET
	phase 5

	/* String instructions: the whole table. */
	lea rdi, [rip + t_pt]
	xor eax, eax
	mov ecx, 512
	rep stosq
	gone TARGET
	lea rdi, [rip + t_pt]
	mov eax, FRAME_B+3
	mov ecx, 512
	rep stosq
	flush TARGET
	present TARGET, made_1, b
	present FIRST, made_first, b
	lea rdi, [rip + t_pt + 4092]
	xor eax, eax
	mov ecx, 1024
	std
	rep stosd
	cld
	flush TARGET
	flush FIRST
	gone TARGET
	gone FIRST
	put t_copy+40, FRAME_A+3
	lea rsi, [rip + t_copy]
	lea rdi, [rip + t_pt]
	mov ecx, 512
	rep movsq
	present TARGET, made_1, a
	gone FIRST
	phase 6

	/* Stores that begin on the page before the table. */
	movabs rax, (FRAME_B+3) << 32
	mov [rip + t_pt - 4], rax
	present FIRST, made_first, b
	lea rdi, [rip + t_pt - 3]
	xor eax, eax
	mov ecx, 11
	rep stosb
	flush FIRST
	gone FIRST
	movups xmm0, [rip + wide + 4]
	movups [rip + t_pt - 8], xmm0
	gone FIRST
	movups xmm0, [rip + wide - 4]
	movups [rip + t_pt - 8], xmm0
	present FIRST, made_first, b
	present TARGET, made_1, a
	put t_pt, 0
	flush FIRST
	gone FIRST
	phase 7

	/* What changes no mapping: accessed and dirty bits, write permission. */
	and qword ptr [rip + t_pt + 40], ~0x60
	flush TARGET
	present TARGET, made_1, a
	and qword ptr [rip + t_pt + 40], ~2
	flush TARGET
	present TARGET, made_1, a
	or qword ptr [rip + t_pt + 40], 2
	and qword ptr [rip + t_pd + 8], ~0x20
	flush TARGET
	present TARGET, made_1, a
	phase 8

	/* A large page in place of the table, with and without its PAT bit, another one, and the table again. */
	put t_pd+8, LARGE_C+LARGE+3
	flush TARGET
	present TARGET, made_1, c
	put t_pd+8, LARGE_C+LARGE+PAT_LARGE+3
	flush TARGET
	present TARGET, made_1, c
	put t_pd+8, LARGE_D+LARGE+3
	flush TARGET
	present TARGET, made_1, d
	put t_pd+8, PHYS(t_pt)+3
	flush TARGET
	present TARGET, made_1, a
	phase 9
	/* A large page that is split: the same frames through another table. Then that table counts, and the one before no more. */
	put t_pd+8, LARGE_C+LARGE+3
	flush TARGET
	present TARGET, made_1, c
	lea rdi, [rip + t_pt2]
	mov eax, LARGE_C+3
	mov ecx, 512
1:	mov [rdi], rax
	add rdi, 8
	add rax, 4096
	dec ecx
	jnz 1b
	put t_pd+8, PHYS(t_pt2)+3
	flush TARGET
	present TARGET, made_1, c
	put t_pt+40, FRAME_B+3
	present TARGET, made_1, c
	put t_pt2+40, FRAME_A+3
	flush TARGET
	present TARGET, made_1, a
	put t_pd+8, PHYS(t_pt)+3
	flush TARGET
	present TARGET, made_1, b
	/* One string instruction over three tables, of which the last changes. */
	lea rsi, [rip + t_pt]
	lea rdi, [rip + t_save]
	mov ecx, 3 * 512
	rep movsq
	mov qword ptr [rip + t_save + 2 * 4096 + 8], 0
	lea rsi, [rip + t_save]
	lea rdi, [rip + t_pt]
	mov ecx, 3 * 512
	rep movsq
	flush TARGET
	gone TARGET
	put t_pd+8, PHYS(t_pt)+3
	present TARGET, made_1, b
	phase 10

	/* The levels above. */
	put t_pdpt, 0
	flush TARGET
	gone TARGET
	put t_pdpt, LARGE+3
	flush TARGET
	present TARGET, made_1, e
	put t_pdpt, PHYS(t_pd)+3
	flush TARGET
	present TARGET, made_1, b
	mov qword ptr [r12 + 8], 0
	flush TARGET
	gone TARGET
	movabs rax, offset PHYS(t_pdpt)+3
	mov [r12 + 8], rax
	present TARGET, made_1, b
	/* A reserved bit, and a table beyond memory. */
	movabs rax, offset PHYS(t_pdpt)+3+LARGE
	mov [r12 + 8], rax
	flush TARGET
	gone TARGET
	movabs rax, 0x100000003
	mov [r12 + 8], rax
	flush TARGET
	gone TARGET
	movabs rax, offset PHYS(t_pdpt)+3
	mov [r12 + 8], rax
	flush TARGET
	present TARGET, made_1, b
	phase 11

	/* Another root with the same tables below. */
	under root2
	present TARGET, made_2, b
	put t_pt+40, FRAME_A+3
	flush TARGET
	present TARGET, made_2, a
	mov rcx, [rip + root2]
	mov qword ptr [rcx + 8], 0
	flush TARGET
	gone TARGET
	under root1
	present TARGET, made_1, a
	put t_pt+40, FRAME_B+3
	flush TARGET
	present TARGET, made_1, b
	movabs rax, offset PHYS(t_pdpt)+3
	mov rcx, [rip + root2]
	mov [rcx + 8], rax
	under root2
	present TARGET, made_2, b
	under root1
	phase 12

	/* One frame that is a page directory under root 1 and a page table under root 3. */
	put t3_pd, PHYS(t_pd)+3
	put t3_pdpt, PHYS(t3_pd)+3
	mov rcx, [rip + root3]
	movabs rax, offset PHYS(t3_pdpt)+3
	mov [rcx + 16], rax
	gone ROLE1
	put t_pd+24, LARGE_C+LARGE+3
	present ROLE1, made_role1, f
	under root3
	present ROLE3, made_role3, f
	put t_pd+24, LARGE_D+LARGE+3
	flush ROLE3
	present ROLE3, made_role3, g
	under root1
	flush ROLE1
	present ROLE1, made_role1, g
	put t_pd+24, 0
	flush ROLE1
	gone ROLE1
	under root3
	gone ROLE3
	under root1
	phase 13

	/* A root that is its own table, and the entry written through that. */
	mov [r12 + 24], r12
	or qword ptr [r12 + 24], 3
	movabs rdi, SELF
	mov eax, FRAME_A+3
	mov [rdi + 40], rax
	flush TARGET
	present TARGET, made_1, a
	movabs rdi, SELF
	mov dword ptr [rdi + 40], 0
	flush TARGET
	gone TARGET
	mov qword ptr [r12 + 24], 0
	phase 14

	/* A table on a page with code that is tapped. */
	put t_in_code+40, FRAME_B+3
	put t_pd+8, PHYS(t_in_code)+3
	flush TARGET
	present TARGET, made_1, b
	call in_table
	put t_in_code+40, FRAME_A+3
	flush TARGET
	present TARGET, made_1, a
	call in_table
	mov byte ptr [rip + t_in_code + 40], 0
	flush TARGET
	gone TARGET
	call in_table
	mov byte ptr [rip + t_in_code + 40], 3
	present TARGET, made_1, a
	holds t_in_code+40, FRAME_A+3
	phase 15

	/* By another vCPU. */
	mov rax, [rip + boot_info]
	cmp qword ptr [rax + 24], 1
	je 3f
	mov ebx, 8
1:	inc qword ptr [rip + asked]
2:	pause
	mov rax, [rip + asked]
	cmp rax, [rip + answered]
	jne 2b
	push rbx
	flush TARGET
	test byte ptr [rip + answered], 1
	jz 4f
	present TARGET, made_1, b
	jmp 5f
4:	present TARGET, made_1, a
5:	pop rbx
	dec ebx
	jnz 1b
3:	mov byte ptr [rip + t_in_code + 40], 0
	flush TARGET
	gone TARGET
	phase 16
	pop r12
	pop rbx
	ret

ap_main:
	under root1
1:	pause
	cmp qword ptr [rip + done], 0
	jne 3f
	mov rax, [rip + asked]
	cmp rax, [rip + answered]
	je 1b
	mov ecx, FRAME_A+3
	test al, 1
	jz 2f
	mov ecx, FRAME_B+3
2:	mov [rip + t_in_code + 40], rcx
	mov [rip + answered], rax
	jmp 1b
3:	ret

	.section .tapped, "ax"
	.global in_table, t_in_code
t_in_code:
	.skip 2048
in_table:
	count made_in_table
	ret
	.org TAPPED_SIZE

	.section .data
body_a:	body ran_a
body_b:	body ran_b
body_c:	body ran_c
body_d:	body ran_d
body_e:	body ran_e
body_f:	body ran_f
body_g:	body ran_g
	.balign 16
	.quad 0
	.long 0
	/* The upper half of an entry, an entry, the lower half of another. */
wide:	.long 0
	.quad FRAME_B+3
	.long 0
	.quad 0

	.bss
	.balign 4096
	.skip 4096
t_pt:	.skip 4096
t_pt2:	.skip 4096
t_pd:	.skip 4096
t_pdpt:	.skip 4096
t3_pd:	.skip 4096
t3_pdpt:	.skip 4096
t_copy:	.skip 4096
t_save:	.skip 3 * 4096
