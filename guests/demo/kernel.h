/* The demo kernel: what its parts know of each other. */
#ifndef KERNEL_H
#define KERNEL_H

#include "truth.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define KBASE 0xffffffff80000000UL /* the image's window: KBASE + pa */
#define PHYSMAP 0xffff888000000000UL /* all of RAM, writable, not executable */
#define PAGE 4096UL
#define MAX_VCPUS TRUTH_VCPUS
#define KSTACK_SIZE 8192UL
#define USER_STACK_TOP 0x7ffffffff000UL
#define USER_STACK_SIZE (16 * PAGE)

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_DATA 0x1b
#define USER_CODE 0x23
#define TSS_SELECTOR 0x28

#define VECTOR_TIMER 0x40
#define VECTOR_WAKE 0x41
#define VECTOR_SPURIOUS 0xff

#define EFAULT 14
#define ENOENT 2
#define EBADF 9
#define EACCES 13
#define EMFILE 24
#define ENOSPC 28
#define ENOEXEC 8

#define OPEN_READ 0x0
#define OPEN_WRITE 0x1
#define OPEN_CREATE 0x40
#define OPEN_CHECK 0x10000 /* only ask whether it could be opened: no descriptor is taken */

/* A function that a tap can count on: never inlined, cloned or called with an ABI of its own. */
#define TRACEABLE __attribute__((noinline, noclone, used))

/* What a trap pushes; entry.S builds it. */
struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

enum task_state { TASK_FREE, TASK_READY, TASK_WAITING, TASK_DEAD };

struct file;
struct open_file {
	struct file *file;
	u64 position;
	u64 flags;
};

#define MAX_TASKS 24
#define MAX_FDS 8

struct task {
	u64 rsp; /* the kernel stack pointer while it does not run */
	u64 stack_top;
	u64 root;
	volatile u64 state;
	volatile u64 round; /* the last round it has done */
	u64 vcpu;
	u64 pid;
	u64 traps; /* INT3s of its own */
	const char *name;
	struct open_file fds[MAX_FDS];
};

/* Per-vCPU data, found through GS; the offsets of the first three are known to entry.S. */
struct cpu {
	struct cpu *self;
	u64 stack_top; /* where SYSCALL puts the stack */
	u64 user_rsp;
	u64 index;
	struct task *current;
	struct task idle;
	u64 next; /* where the search for the next task begins */
};

static inline struct cpu *this_cpu(void)
{
	struct cpu *cpu;
	__asm__ volatile("mov %%gs:0, %0" : "=r"(cpu));
	return cpu;
}

typedef struct {
	volatile u32 held;
} spinlock;

/* Takes the lock with interrupts off; gives back what RFLAGS was. */
static inline u64 lock(spinlock *l)
{
	u64 flags;
	__asm__ volatile("pushfq; pop %0; cli" : "=r"(flags)::"memory");
	while (__atomic_exchange_n(&l->held, 1, __ATOMIC_ACQUIRE))
		__asm__ volatile("pause");
	return flags;
}

static inline void unlock(spinlock *l, u64 flags)
{
	__atomic_store_n(&l->held, 0, __ATOMIC_RELEASE);
	if (flags & 0x200)
		__asm__ volatile("sti" ::: "memory");
}

static inline void count(unsigned long *counter, u64 n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline u64 rdmsr(u32 msr)
{
	u32 low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return low | (u64)high << 32;
}

static inline void wrmsr(u32 msr, u64 value)
{
	__asm__ volatile("wrmsr" ::"c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

/* entry.S */
extern u64 trap_stubs[];
extern const u64 exception_table[], exception_table_end[];
void syscall_entry(void);
void switch_stack(u64 *save, u64 load, u64 root);
void trap_return(void);
u64 copy_user(void *to, const void *from, u64 n);
long copy_user_string(char *to, const char *from, u64 limit);
__attribute__((noreturn)) void halt_forever(void);
extern volatile u64 others_may_start;

/* console.c */
void *memcpy(void *to, const void *from, u64 n);
void *memset(void *to, int value, u64 n);
u64 string_length(const char *s);
int string_equal(const char *a, const char *b);
int starts_with(const char *s, const char *prefix);
void console_write(const char *text, u64 n);
void print(const char *text);
void print_number(u64 value);
__attribute__((noreturn)) void panic(const char *why, u64 first, u64 second);

/* memory.c */
extern u64 kernel_root;
void memory_init(u64 memory_size);
void *physical(u64 pa);
u64 frame_allocate(void);
void map_page(u64 root, u64 va, u64 pa, u64 flags);
u64 user_root(void);
#define PTE_PRESENT 1UL
#define PTE_WRITE 2UL
#define PTE_USER 4UL
#define PTE_NX (1UL << 63)

#define MSR_KERNEL_GS_BASE 0xc0000102

/* trap.c */
void cpu_init(u64 index);
void timer_start(u64 ticks);
void wake_others(void);

/* task.c */
extern volatile u64 current_round;
extern volatile u64 stopping;
TRACEABLE int spawn_task(const char *path);
void spawn_kernel_thread(const char *name, void (*function)(void), u64 vcpu);
int schedule(void);
void wait_for_round(u64 round);
void finish_round(u64 round);
int all_finished(u64 round);
void exit_task(void);
void idle_loop(void) __attribute__((noreturn));

/* files.c */
TRACEABLE int open_file(const char *path, u64 flags);
TRACEABLE long read_file(int fd, void *buffer, u64 n);
TRACEABLE long write_file(int fd, const void *buffer, u64 n);
TRACEABLE int close_file(int fd);
const char *file_text(const char *path, u64 *size);

/* services.c */
TRACEABLE int check_licence(const char *key);
TRACEABLE long send_packet(u32 destination, const void *buffer, u64 n);

/* check.c */
void check_init(u64 wanted);
void check_integrity(void);
u64 mismatches_seen(void);

/* probe.c */
void probe(u64 round, int requests);
void probe_give(void);
void probe_trace(void);
void probe_storm(void);
void probe_traced(void);

/* syscall.c */
void syscall_handler(struct frame *frame);

extern struct truth truth;
extern struct cpu cpus[MAX_VCPUS];
extern char text_start[], text_end[], rodata_start[], data_start[], image_end[];

#endif
