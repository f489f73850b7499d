/*
 * The boot loader: an option ROM that the BIOS calls at the end of its self-test. Enters 32-bit protected mode, has load() read the
 * images straight to their places, and jumps to the multiboot kernel as the Multiboot Specification 0.6.96, section 3.2, asks.
 * A boot through GRUB and the BIOS's disk calls takes minutes here, this takes seconds.
 */
#define ROM_SIZE_IN_512 4
#define MULTIBOOT_BOOTLOADER_MAGIC 0x2badb002

	.section .text.start, "ax"
	.code16
	.globl _start
_start:
	.byte 0x55, 0xaa, ROM_SIZE_IN_512
	cli
	cld
	inb $0x92, %al			/* A20 on */
	orb $2, %al
	outb %al, $0x92
	lgdtl %cs:(gdtr - _start)
	mov %cr0, %eax
	or $1, %al
	mov %eax, %cr0
	ljmpl $8, $protected

	.code32
protected:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov %eax, %fs
	mov %eax, %gs
	mov $0x80000, %esp
	call load			/* EAX = entry point, EDX = multiboot information */
	mov %eax, %ecx
	mov %edx, %ebx
	mov $MULTIBOOT_BOOTLOADER_MAGIC, %eax
	jmp *%ecx

	.balign 8
gdt:
	.quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:
	.word 23
	.long gdt

	.section .note.GNU-stack, "", @progbits
