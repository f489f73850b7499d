/*
 * mode=probes: what programs do to find out where they run, and kernels with their processor. A processor can have each of these
 * instructions announced to its hypervisor. What came of them is left for the host to look at.
 */
#include "kernel.h"

#define CPUID_HYPERVISOR 0x40000000
#define CR3_PWT (1UL << 3)
#define CR4_TSD (1UL << 2)
#define HYPERCALL_HVM_OP 34
#define GUEST_REQUEST_VM_EVENT 24
#define HYPERCALL_MEMORY_OP 12
#define DECREASE_RESERVATION 1
#define DOMID_SELF 0x7ff0

/* Symbol `probe_results`, read by the tests: the layout is theirs too. */
struct {
	u64 rounds;
	/* What CPUID said in the last round: EAX to EDX. */
	u64 cpuid[4];
	/* What KERNEL_GS_BASE was after the number of the round was written to it. */
	u64 msr;
	/* CR4 before and after TSD was turned over. */
	u64 cr4_before, cr4_after;
	/* CR3 before and after its bit for write-through was turned over. */
	u64 cr3_before, cr3_after;
	/* What SGDT and SIDT stored: limits. */
	u64 limits[2];
	/* What the hypervisor answered to the request, with requests=1. */
	long requested;
	/* How many pages it took back, with give=1. */
	long given;
	/* Debug exceptions it got, with trace=1: one for each instruction of probe_trace with the trap flag on. */
	u64 traced;
} probe_results;

/* The page that is given back: nobody needs it. */
char probe_page[PAGE] __attribute__((aligned(PAGE)));

TRACEABLE void probe_cpuid(void)
{
	unsigned eax = CPUID_HYPERVISOR, ebx, ecx = 0, edx;
	__asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
	probe_results.cpuid[0] = eax;
	probe_results.cpuid[1] = ebx;
	probe_results.cpuid[2] = ecx;
	probe_results.cpuid[3] = edx;
}

TRACEABLE void probe_registers(u64 round)
{
	u64 value;
	wrmsr(MSR_KERNEL_GS_BASE, round);
	probe_results.msr = rdmsr(MSR_KERNEL_GS_BASE);
	__asm__ volatile("mov %%cr4, %0" : "=r"(value));
	probe_results.cr4_before = value;
	__asm__ volatile("mov %0, %%cr4" ::"r"(value ^ CR4_TSD) : "memory");
	__asm__ volatile("mov %%cr4, %0" : "=r"(value));
	probe_results.cr4_after = value;
	__asm__ volatile("mov %%cr3, %0" : "=r"(value));
	probe_results.cr3_before = value;
	__asm__ volatile("mov %0, %%cr3" ::"r"(value ^ CR3_PWT) : "memory");
	__asm__ volatile("mov %%cr3, %0" : "=r"(value));
	probe_results.cr3_after = value;
}

TRACEABLE void probe_tables(void)
{
	struct {
		unsigned short limit;
		u64 base;
	} __attribute__((packed)) gdt, idt;
	__asm__ volatile("sgdt %0; sidt %1" : "=m"(gdt), "=m"(idt));
	probe_results.limits[0] = gdt.limit;
	probe_results.limits[1] = idt.limit;
}

TRACEABLE void probe_request(void)
{
	long result = HYPERCALL_HVM_OP;
	__asm__ volatile("vmcall" : "+a"(result) : "D"(GUEST_REQUEST_VM_EVENT), "S"(0) : "memory");
	probe_results.requested = result;
}

/* As a guest does that is asked to use less memory. */
TRACEABLE void probe_give(void)
{
	u64 frame = ((u64)probe_page - KBASE) / PAGE;
	struct {
		u64 *frames;
		u64 count;
		unsigned order, flags;
		unsigned short domain;
	} reservation = {&frame, 1, 0, 0, DOMID_SELF};
	long result = HYPERCALL_MEMORY_OP;
	__asm__ volatile("vmcall" : "+a"(result) : "D"(DECREASE_RESERVATION), "S"(&reservation) : "memory");
	probe_results.given = result;
}

void probe_traced(void)
{
	probe_results.traced++;
}

/* Executes a few instructions with the trap flag on. */
TRACEABLE void probe_trace(void)
{
	__asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; nop; nop; pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
}

/* Breakpoints of its own in every form: plain, behind prefixes, and as the interrupt. */
TRACEABLE void probe_storm(void)
{
	__asm__ volatile(".global storm_plain, storm_prefixed\n"
			 "storm_plain: int3\n"
			 "storm_prefixed: .byte 0x66, 0xcc, 0xf3, 0xcc, 0x48, 0xcc\n"
			 ".byte 0x66, 0x2e, 0xf2, 0x48, 0xcc, 0xcd, 3" ::: "memory", "cc");
}

void probe(u64 round, int requests)
{
	probe_cpuid();
	probe_registers(round);
	probe_tables();
	if (requests)
		probe_request();
	probe_results.rounds = round;
}
