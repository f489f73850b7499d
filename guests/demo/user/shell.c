/* A person at a shell: looks at a few files, and once a round hands the kernel a bad pointer. */
#include "user.h"

TRACEABLE void cat(const char *path, int aloud)
{
	char buffer[128];
	long n = read_whole(path, buffer, sizeof buffer);
	if (n > 0 && aloud)
		sys_write(1, buffer, n);
}

void shell_main(void)
{
	u64 round = 0;
	for (;;) {
		round = sys_next_round(round);
		cat("/etc/motd", round == 1);
		cat("/home/alice/notes.txt", 0);
		sys_open((const char *)0x10, OPEN_READ);
	}
}
