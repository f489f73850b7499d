/* Calls functions of both calling conventions, as the compiler does: conventions.c. */
#include "boot.inc"

	.text
	.global main
main:
	push rbp
	call calls
	pop rbp
	ret
