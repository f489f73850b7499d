/*
 * Tasks and rounds.
 *
 * A task stays on its vCPU. The timer takes the processor from it; so does waiting for the next round. In each round every task
 * does one turn of its work, so how often each function is called depends on the number of rounds alone, never on timing.
 */
#include "kernel.h"

#define MAX_PROGRAMS 4

struct program {
	const char *name;
	char *entry, *text, *text_end, *text_pa, *data, *data_end, *data_pa;
};

#define PROGRAM(name) \
	extern char name##_main[], name##_text[], name##_text_end[], name##_text_pa[], name##_data[], name##_data_end[], name##_data_pa[]
#define ENTRY(name) \
	{#name, name##_main, name##_text, name##_text_end, name##_text_pa, name##_data, name##_data_end, name##_data_pa}

PROGRAM(shell);
PROGRAM(app);
PROGRAM(updater);
PROGRAM(implant);

static const struct program programs[MAX_PROGRAMS] = {ENTRY(shell), ENTRY(app), ENTRY(updater), ENTRY(implant)};

volatile u64 current_round;
volatile u64 stopping;
static struct task tasks[MAX_TASKS];
static u8 stacks[MAX_TASKS][KSTACK_SIZE] __attribute__((aligned(4096)));
static spinlock task_lock;
static u64 last_pid;

void set_kernel_stack(u64 top);

/* Takes a task slot; it does not run before `start_task`. */
static struct task *new_task(const char *name)
{
	u64 flags = lock(&task_lock);
	struct task *task = 0;
	for (int i = 0; i < MAX_TASKS && !task; i++)
		if (tasks[i].state == TASK_FREE) {
			task = &tasks[i];
			task->state = TASK_DEAD;
			task->stack_top = (u64)(stacks[i] + KSTACK_SIZE);
		}
	if (task)
		task->pid = ++last_pid;
	unlock(&task_lock, flags);
	if (task) {
		task->name = name;
		task->root = kernel_root;
		/* Born in this round, at work from the next one on. */
		task->round = current_round;
	}
	return task;
}

/* Lays a trap frame on the task's stack, as if it had been interrupted at `rip`, and lets it run. */
static void start_task(struct task *task, u64 vcpu, u64 rip, u64 rsp, u64 cs, u64 ss)
{
	struct frame *frame = (struct frame *)task->stack_top - 1;
	u64 *stack = (u64 *)frame;
	memset(frame, 0, sizeof *frame);
	frame->rip = rip;
	frame->cs = cs;
	frame->rflags = 0x202;
	frame->rsp = rsp;
	frame->ss = ss;
	frame->rdi = task->pid;
	*--stack = (u64)trap_return;
	for (int i = 0; i < 6; i++)
		*--stack = 0;
	task->rsp = (u64)stack;
	task->vcpu = vcpu;
	__atomic_store_n(&task->state, TASK_READY, __ATOMIC_RELEASE);
}

static void map_program(const struct program *program, u64 root)
{
	for (u64 at = 0; program->text + at < program->text_end; at += PAGE)
		map_page(root, (u64)program->text + at, (u64)program->text_pa + at, PTE_USER);
	for (u64 at = 0; program->data + at < program->data_end; at += PAGE)
		map_page(root, (u64)program->data + at, (u64)program->data_pa + at, PTE_USER | PTE_WRITE | PTE_NX);
	map_page(root, USER_STACK_TOP - PAGE, frame_allocate(), PTE_USER | PTE_WRITE | PTE_NX);
}

/* Starts the program that the file at `path` names in its first line ("#!native NAME"). Gives its pid. */
TRACEABLE int spawn_task(const char *path)
{
	static const char magic[] = "#!native ";
	count(&truth.calls[CALLS_SPAWN_TASK], 1);
	u64 size;
	const char *text = file_text(path, &size);
	if (!text)
		return -ENOENT;
	if (size <= sizeof magic || !starts_with(text, magic))
		return -ENOEXEC;
	text += sizeof magic - 1;
	for (int i = 0; i < MAX_PROGRAMS; i++) {
		const struct program *program = &programs[i];
		if (!starts_with(text, program->name))
			continue;
		struct task *task = new_task(program->name);
		if (!task)
			return -EMFILE;
		task->root = user_root();
		map_program(program, task->root);
		start_task(task, (task->pid - 1) % truth.vcpus, (u64)program->entry, USER_STACK_TOP - 8, USER_CODE, USER_DATA);
		return task->pid;
	}
	return -ENOEXEC;
}

void spawn_kernel_thread(const char *name, void (*function)(void), u64 vcpu)
{
	struct task *task = new_task(name);
	if (!task)
		panic("too many tasks", vcpu, 0);
	/* Its own stack, below the frame; the 8 is the return address that C expects. */
	u64 rsp = task->stack_top - sizeof(struct frame) - 8;
	start_task(task, vcpu, (u64)function, (rsp & -16UL) - 8, KERNEL_CODE, KERNEL_DATA);
}

static int can_run(const struct task *task, u64 vcpu)
{
	if (task->vcpu != vcpu)
		return 0;
	u64 state = __atomic_load_n(&task->state, __ATOMIC_ACQUIRE);
	return state == TASK_READY || (state == TASK_WAITING && task->round < current_round);
}

/* Lets the next task of this vCPU run; comes back when this one is chosen again. Interrupts are off. False if there is no other. */
int schedule(void)
{
	struct cpu *cpu = this_cpu();
	struct task *before = cpu->current, *next = 0;
	for (u64 i = 1; i <= MAX_TASKS && !next; i++) {
		struct task *task = &tasks[(cpu->next + i) % MAX_TASKS];
		if (task != before && can_run(task, cpu->index)) {
			next = task;
			cpu->next = (cpu->next + i) % MAX_TASKS;
		}
	}
	if (!next) {
		if (before == &cpu->idle || can_run(before, cpu->index)) {
			if (before != &cpu->idle)
				before->state = TASK_READY;
			return 0;
		}
		next = &cpu->idle;
	}
	if (next != &cpu->idle)
		next->state = TASK_READY;
	truth.vcpu_switches[cpu->index]++;
	cpu->current = next;
	set_kernel_stack(next->stack_top);
	switch_stack(&before->rsp, next->rsp, next->root);
	return 1;
}

/* Says that the running task has done its work of `round`. */
void finish_round(u64 round)
{
	__atomic_store_n(&this_cpu()->current->round, round, __ATOMIC_RELEASE);
}

/* Waits until a round after `round` begins. */
void wait_for_round(u64 round)
{
	__asm__ volatile("cli" ::: "memory");
	finish_round(round);
	this_cpu()->current->state = TASK_WAITING;
	schedule();
}

/* Whether every task but the running one has done its work of `round`. */
int all_finished(u64 round)
{
	for (int i = 0; i < MAX_TASKS; i++) {
		u64 state = __atomic_load_n(&tasks[i].state, __ATOMIC_ACQUIRE);
		if (&tasks[i] != this_cpu()->current && (state == TASK_READY || state == TASK_WAITING) && tasks[i].round < round)
			return 0;
	}
	return 1;
}

void exit_task(void)
{
	__asm__ volatile("cli" ::: "memory");
	this_cpu()->current->state = TASK_DEAD;
	schedule();
	panic("a dead task runs", 0, 0);
}

void idle_loop(void)
{
	for (;;)
		__asm__ volatile("sti; hlt" ::: "memory");
}
