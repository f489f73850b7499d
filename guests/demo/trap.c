/* Descriptor tables, exceptions and the local APIC (x2APIC mode: through MSRs). */
#include "kernel.h"

#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FMASK 0xc0000084
#define MSR_GS_BASE 0xc0000101
#define APIC_EOI 0x80b
#define APIC_SVR 0x80f
#define APIC_ICR 0x830
#define APIC_LVT_TIMER 0x832
#define APIC_INITIAL_COUNT 0x838
#define APIC_DIVIDE 0x83e
#define APIC_PERIODIC (1 << 17)
#define APIC_ALL_BUT_SELF (3 << 18)

#define VECTOR_DEBUG 1
#define VECTOR_BREAKPOINT 3
#define VECTOR_DOUBLE_FAULT 8
#define VECTOR_PAGE_FAULT 14

struct table_register {
	u16 limit;
	u64 base;
} __attribute__((packed));

struct tss {
	u32 reserved0;
	u64 rsp[3];
	u64 reserved1;
	u64 ist[7];
	u64 reserved2;
	u16 reserved3;
	u16 io_map;
} __attribute__((packed));

struct cpu cpus[MAX_VCPUS];
static u64 gdts[MAX_VCPUS][8];
static struct tss tss[MAX_VCPUS];
static u64 idt[256][2];
static u8 double_fault_stacks[MAX_VCPUS][1024] __attribute__((aligned(16)));

static void gate(int vector, u64 handler, u64 dpl, u64 ist)
{
	idt[vector][0] = (handler & 0xffff) | KERNEL_CODE << 16 | ist << 32 | (0x8e00 | dpl << 13) << 32 | (handler >> 16 & 0xffff) << 48;
	idt[vector][1] = handler >> 32;
}

/* Makes this vCPU's tables and loads them. vCPU 0 comes first, and alone. */
void cpu_init(u64 index)
{
	struct cpu *cpu = &cpus[index];
	struct tss *t = &tss[index];
	u64 *gdt = gdts[index];
	u64 base = (u64)t;

	if (index == 0) {
		for (int i = 0; i < 22; i++)
			gate(i, trap_stubs[i], i == VECTOR_BREAKPOINT ? 3 : 0, i == VECTOR_DOUBLE_FAULT);
		gate(VECTOR_TIMER, trap_stubs[22], 0, 0);
		gate(VECTOR_WAKE, trap_stubs[23], 0, 0);
		gate(VECTOR_SPURIOUS, trap_stubs[24], 0, 0);
	}
	t->io_map = sizeof *t;
	t->ist[0] = (u64)(double_fault_stacks[index] + sizeof double_fault_stacks[index]);
	gdt[1] = 0x00af9b000000ffff;
	gdt[2] = 0x00cf93000000ffff;
	gdt[3] = 0x00cff3000000ffff;
	gdt[4] = 0x00affb000000ffff;
	gdt[5] = (sizeof *t - 1) | (base & 0xffffff) << 16 | 0x89UL << 40 | (base >> 24 & 0xff) << 56;
	gdt[6] = base >> 32;

	struct table_register gdtr = {sizeof gdts[0] - 1, (u64)gdt};
	struct table_register idtr = {sizeof idt - 1, (u64)idt};
	__asm__ volatile("lgdt %0; lidt %1" ::"m"(gdtr), "m"(idtr));
	__asm__ volatile("push %0; lea 1f(%%rip), %%rax; push %%rax; lretq; 1:" ::"i"(KERNEL_CODE) : "rax", "memory");
	__asm__ volatile("mov %0, %%ss; mov %0, %%ds; mov %0, %%es; mov %1, %%fs; mov %1, %%gs" ::"r"(KERNEL_DATA), "r"(0));
	__asm__ volatile("ltr %w0" ::"r"(TSS_SELECTOR));

	cpu->self = cpu;
	cpu->index = index;
	cpu->current = &cpu->idle;
	cpu->idle.root = kernel_root;
	cpu->idle.vcpu = index;
	cpu->idle.name = "idle";
	wrmsr(MSR_GS_BASE, (u64)cpu);
	wrmsr(MSR_KERNEL_GS_BASE, 0);
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1);
	wrmsr(MSR_STAR, (u64)KERNEL_DATA << 48 | (u64)KERNEL_CODE << 32);
	wrmsr(MSR_LSTAR, (u64)syscall_entry);
	wrmsr(MSR_FMASK, 0x44700); /* AC, NT, DF, IF, TF */
	wrmsr(APIC_SVR, 0x100 | VECTOR_SPURIOUS);
	count(&truth.vcpus, 1);
}

/* The stack for the next trap or SYSCALL out of ring 3 on this vCPU. */
void set_kernel_stack(u64 top)
{
	struct cpu *cpu = this_cpu();
	cpu->stack_top = top;
	tss[cpu->index].rsp[0] = top;
}

void timer_start(u64 ticks)
{
	wrmsr(APIC_DIVIDE, 0xb);
	wrmsr(APIC_LVT_TIMER, APIC_PERIODIC | VECTOR_TIMER);
	wrmsr(APIC_INITIAL_COUNT, ticks);
}

/* Makes every other vCPU look for work, or stop. */
void wake_others(void)
{
	if (truth.vcpus > 1)
		wrmsr(APIC_ICR, APIC_ALL_BUT_SELF | VECTOR_WAKE);
}

static void page_fault(struct frame *frame, u64 address)
{
	if (frame->cs & 3) {
		if (address >= USER_STACK_TOP - USER_STACK_SIZE && address < USER_STACK_TOP && !(frame->error & 1)) {
			map_page(this_cpu()->current->root, address & -PAGE, frame_allocate(), PTE_WRITE | PTE_USER | PTE_NX);
			count(&truth.page_faults_user, 1);
			return;
		}
		print(this_cpu()->current->name);
		print(": segmentation fault\n");
		exit_task();
	}
	for (const u64 *e = exception_table; e < exception_table_end; e += 2)
		if (e[0] == frame->rip) {
			frame->rip = e[1];
			count(&truth.page_faults_fixed, 1);
			return;
		}
	panic("page fault in the kernel, address and RIP", address, frame->rip);
}

TRACEABLE void timer_tick(struct frame *frame)
{
	struct cpu *cpu = this_cpu();
	truth.vcpu_ticks[cpu->index]++;
	wrmsr(APIC_EOI, 0);
	if (stopping)
		halt_forever();
	int from_user = frame->cs & 3;
	if (schedule() && from_user)
		count(&truth.preemptions, 1);
}

void trap_handler(struct frame *frame)
{
	u64 address;
	__asm__ volatile("mov %%cr2, %0" : "=r"(address));
	switch (frame->vector) {
	case VECTOR_TIMER:
		timer_tick(frame);
		break;
	case VECTOR_WAKE:
		wrmsr(APIC_EOI, 0);
		if (stopping)
			halt_forever();
		schedule();
		break;
	case VECTOR_SPURIOUS:
		break;
	case VECTOR_DEBUG:
		probe_traced();
		break;
	case VECTOR_BREAKPOINT:
		this_cpu()->current->traps++;
		count(&truth.breakpoints, 1);
		break;
	case VECTOR_PAGE_FAULT:
		page_fault(frame, address);
		break;
	default:
		if (frame->cs & 3) {
			print(this_cpu()->current->name);
			print(": killed by exception ");
			print_number(frame->vector);
			print("\n");
			exit_task();
		}
		panic("exception in the kernel, vector and RIP", frame->vector, frame->rip);
	}
}
