/* A licensed application: asks about its licence, looks for a debugger, works, writes a log. */
#include "user.h"

static const char key[] = "AAAA-BBBB-CCCC-DDDD";
static u64 result;
static int told = -1;

/* Whether an INT3 of our own reaches the kernel's handler. A debugger would have swallowed it. */
TRACEABLE int debugger_is_here(void)
{
	u64 before = sys_traps();
	__asm__ volatile("int3");
	return sys_traps() != before + 1;
}

/* Long enough for the timer to come in between. */
TRACEABLE u64 compute(u64 seed)
{
	for (int i = 0; i < 40000; i++) {
		seed = seed * 6364136223846793005 + 1442695040888963407;
		if (seed >> 63)
			seed ^= i;
	}
	return seed;
}

/* Takes pages of stack that are not there yet. */
TRACEABLE u64 deep(u64 seed)
{
	volatile char block[5 * 4096];
	for (u64 i = 0; i < sizeof block; i += 4096)
		block[i] = seed + i;
	return block[4096];
}

TRACEABLE void write_log(const char *line)
{
	int fd = sys_open("/var/log/app.log", OPEN_WRITE | OPEN_CREATE);
	if (fd < 0)
		return;
	sys_write(fd, line, length(line));
	sys_close(fd);
}

void app_main(void)
{
	char buffer[64];
	u64 round = 0;
	for (;;) {
		round = sys_next_round(round);
		int licensed = sys_licence(key);
		sys_licence_result(licensed);
		if (licensed != told)
			say(licensed ? "app: licence accepted, all features on\n" : "app: licence refused, trial mode\n");
		told = licensed;
		if (debugger_is_here())
			say("app: a debugger is here\n");
		read_whole("/opt/app/app.conf", buffer, sizeof buffer);
		read_whole("/opt/app/data.db", buffer, sizeof buffer);
		result += compute(round) + deep(round);
		write_log(licensed ? "work done (licensed)\n" : "work done (trial)\n");
	}
}
