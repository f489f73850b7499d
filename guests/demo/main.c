/* Start, the command line, the two modes and the verdict. docs/guests.md lists the options. */
#include "kernel.h"

#define BOOT_MAGIC 0x7061746d76UL

struct boot_info {
	u64 magic, version, memory_size, vcpus, command_line;
};

static char command_line[256];
static u64 vcpus, tick, checking, callers_done, paced;

/* Where the value of `name` (with its "=") begins on the command line; null if it is not there. */
static const char *option(const char *name)
{
	for (const char *at = command_line; *at; at++)
		if ((at == command_line || at[-1] == ' ') && starts_with(at, name))
			return at + string_length(name);
	return 0;
}

static u64 number(const char *name, u64 otherwise)
{
	const char *at = option(name);
	u64 value = 0;
	if (!at)
		return otherwise;
	while (*at >= '0' && *at <= '9')
		value = value * 10 + (*at++ - '0');
	return value;
}

static void verdict(void)
{
	u64 bad = mismatches_seen();
	if (!checking) {
		print("integrity: not checked\n");
	} else if (bad) {
		print("integrity: TAMPERING SEEN, ");
		print_number(bad);
		print(" mismatches in ");
		print_number(truth.checks);
		print(" checks\n");
	} else {
		print("integrity: ");
		print_number(truth.checks);
		print(" checks, 0 mismatches\n");
	}
	truth.verdict = !checking ? 3 : bad ? 2 : 1;
	__atomic_store_n(&truth.finished, TRUTH_FINISHED, __ATOMIC_RELEASE);
	stopping = 1;
	wake_others();
	halt_forever();
}

/* Only the wake-up of `verdict` comes in mode=calls; but a loop that takes no interrupts is one that a hypervisor may not get out of. */
static void interrupts_on(void)
{
	__asm__ volatile("sti" ::: "memory");
}

/* Lets everyone else on this vCPU run; sleeps until an interrupt if there is nobody. */
static void yield(void)
{
	__asm__ volatile("cli" ::: "memory");
	if (schedule())
		__asm__ volatile("sti" ::: "memory");
	else
		__asm__ volatile("sti; hlt" ::: "memory");
}

/* vCPU 0: begins each round, checks, and waits until everyone has done the round. */
static void conductor(void)
{
	for (u64 round = 1; round <= truth.rounds_wanted; round++) {
		finish_round(round);
		current_round = round;
		wake_others();
		if (checking)
			check_integrity();
		while (!all_finished(round))
			yield();
		truth.rounds_done = round;
	}
	verdict();
}

/* Every other vCPU: one check a round. */
static void checker(void)
{
	for (;;) {
		wait_for_round(this_cpu()->current->round);
		u64 round = current_round;
		__asm__ volatile("sti" ::: "memory");
		if (checking)
			check_integrity();
		finish_round(round);
	}
}

/* Sleeps until the host has written at least `turn` to `go`. */
static void wait_for_turn(u64 turn)
{
	timer_start(tick);
	while (__atomic_load_n(&truth.go, __ATOMIC_ACQUIRE) < turn)
		__asm__ volatile("sti; hlt" ::: "memory");
	timer_start(0);
}

/* wait=1: so that the host can prepare what it likes before anything is counted. */
static void wait_for_host(void)
{
	if (!number("wait=", 0))
		return;
	if (this_cpu()->index == 0)
		print("waiting\n");
	wait_for_turn(1);
	__asm__ volatile("cli" ::: "memory");
}

/* mode=calls: nothing but calls of one function, in a loop as tight as it can be. */
TRACEABLE void call_loop(u64 calls)
{
	for (u64 i = 0; i < calls; i++) {
		if (paced && i % paced == 0)
			wait_for_turn(i / paced + 1);
		open_file("/etc/hostname", OPEN_CHECK | i << 32);
	}
}

static void calls_mode(u64 calls)
{
	u64 parts = number("parts=", 10);
	for (u64 part = 1; part <= parts; part++) {
		call_loop(calls / parts + (part == parts ? calls % parts : 0));
		if (checking)
			check_integrity();
		truth.rounds_done++;
	}
	while (number("callers=", 0) && __atomic_load_n(&callers_done, __ATOMIC_ACQUIRE) < vcpus - 1)
		__asm__ volatile("pause");
	verdict();
}

/* mode=calls, every other vCPU: checks all the time, or with callers=1 calls as often as the first one and then checks once. */
static void other_calls_mode(void)
{
	if (number("callers=", 0)) {
		call_loop(number("calls=", 100000));
		if (checking)
			check_integrity();
		count(&callers_done, 1);
		halt_forever();
	}
	while (checking && !stopping)
		check_integrity();
	halt_forever();
}

static int is_mode(const char *name)
{
	const char *mode = option("mode=");
	return mode && starts_with(mode, name);
}

/* mode=probes: vCPU 0 alone; the others check once and sleep. */
static void probes_mode(u64 rounds)
{
	for (u64 round = 1; round <= rounds; round++) {
		probe(round, number("requests=", 0) != 0);
		if (number("give=", 0) && round == rounds / 2)
			probe_give();
		if (number("trace=", 0))
			probe_trace();
	}
	for (u64 n = number("storm=", 0); n; n--)
		probe_storm();
	if (checking)
		check_integrity();
	verdict();
}

void kernel_main(u64 info_pa)
{
	const struct boot_info *info = (const struct boot_info *)info_pa;
	const char *line = (const char *)info->command_line;
	if (info->magic != BOOT_MAGIC)
		panic("not booted as docs/guests.md says", info_pa, info->magic);
	u64 memory_size = info->memory_size;
	vcpus = info->vcpus < MAX_VCPUS ? info->vcpus : MAX_VCPUS;
	for (u64 i = 0; i + 1 < sizeof command_line && line[i]; i++)
		command_line[i] = line[i];

	truth.magic = TRUTH_MAGIC;
	truth.version = TRUTH_VERSION;
	memory_init(memory_size);
	cpu_init(0);
	checking = number("check=", 1);
	tick = number("tick=", 20000);
	paced = number("paced=", 0);
	truth.rounds_wanted = number("rounds=", 20);
	check_init(number("kinds=", (1 << READ_KINDS) - 1));

	others_may_start = 1;
	while (__atomic_load_n(&truth.vcpus, __ATOMIC_ACQUIRE) < vcpus)
		__asm__ volatile("pause");
	wait_for_host();
	if (is_mode("calls")) {
		interrupts_on();
		calls_mode(number("calls=", 100000));
	}
	if (is_mode("probes"))
		probes_mode(number("probes=", 10));

	print("demo guest: ");
	print_number(vcpus);
	print(" vCPU, ");
	print_number(memory_size >> 20);
	print(" MiB\n");
	spawn_task("/bin/shell");
	spawn_task("/opt/app/app");
	spawn_task("/bin/updater");
	spawn_kernel_thread("conductor", conductor, 0);
	for (u64 i = 1; i < vcpus; i++)
		spawn_kernel_thread("checker", checker, i);
	timer_start(tick);
	wake_others();
	idle_loop();
}

/* A vCPU that is not the first. */
void other_main(u64 index)
{
	if (index >= MAX_VCPUS)
		halt_forever();
	cpu_init(index);
	if (is_mode("calls")) {
		wait_for_host();
		interrupts_on();
		other_calls_mode();
	}
	if (is_mode("probes")) {
		if (checking)
			check_integrity();
		halt_forever();
	}
	timer_start(tick);
	idle_loop();
}
