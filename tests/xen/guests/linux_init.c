/*
 * The only program of the Linux guest. One process for each vCPU; each works in rounds, as many as dom0 has asked for in the truth
 * page: CALLS times openat, then CHECKS times a look at the kernel's own code, which must be what it was at the start.
 *
 * The truth page is a page of memory that the kernel was told not to use (mem= on its command line); where it is, and which piece of
 * code to look at, stands on the command line too: truth=<physical> code=<physical>.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x78756e696c746d76 /* "vmtlinux" */
#define MAX_VCPUS 8
#define CALLS 10
#define CHECKS 1
#define CODE_SIZE 16

/* tests/xen/dom0/linux_guest.py reads it. */
struct truth {
	uint64_t magic, vcpus, rounds_wanted, reserved;
	uint64_t rounds[MAX_VCPUS];
	uint64_t calls[MAX_VCPUS]; /* openat, finished */
	uint64_t checks[MAX_VCPUS];
	uint64_t mismatches[MAX_VCPUS];
};

static void fail(const char *what)
{
	perror(what);
	for (;;)
		pause();
}

static uint64_t option(int count, char **words, const char *name)
{
	size_t length = strlen(name);
	for (int i = 1; i < count; i++)
		if (!strncmp(words[i], name, length))
			return strtoull(words[i] + length, 0, 0);
	fprintf(stderr, "no %s on the command line\n", name);
	for (;;)
		pause();
}

/* Reads the code as a whole and byte by byte: the kernel copies these with different instructions. */
static int differs(int memory, uint64_t code, const uint8_t *first)
{
	uint8_t now[CODE_SIZE];
	if (pread(memory, now, sizeof now, code) != sizeof now || memcmp(now, first, sizeof now))
		return 1;
	for (int i = 0; i < CODE_SIZE; i++)
		if (pread(memory, now, 1, code + i) != 1 || *now != first[i])
			return 1;
	return 0;
}

int main(int count, char **words)
{
	mount("dev", "/dev", "devtmpfs", 0, "");
	int console = open("/dev/hvc0", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(console, fd);

	uint64_t truth_at = option(count, words, "truth="), code = option(count, words, "code=");
	int memory = open("/dev/mem", O_RDWR);
	volatile struct truth *truth = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, truth_at);
	if (truth == MAP_FAILED)
		fail("truth page");
	uint8_t first[CODE_SIZE];
	if (pread(memory, first, sizeof first, code) != sizeof first)
		fail("code");

	int vcpus = sysconf(_SC_NPROCESSORS_ONLN), me = 0;
	truth->vcpus = vcpus;
	for (int child = 1; child < vcpus; child++)
		if (fork() == 0) {
			me = child;
			break;
		}
	cpu_set_t own;
	CPU_ZERO(&own);
	CPU_SET(me, &own);
	if (sched_setaffinity(0, sizeof own, &own))
		fail("affinity");
	if (me == 0) {
		truth->magic = MAGIC;
		printf("linux guest: %d vCPUs\n", vcpus);
		fflush(stdout);
	}
	for (;;) {
		if (truth->rounds[me] == truth->rounds_wanted) {
			struct timespec millisecond = {0, 1000000};
			nanosleep(&millisecond, 0);
			continue;
		}
		for (int i = 0; i < CALLS; i++) {
			if (open("/nothing", O_RDONLY) != -1)
				fail("/nothing is there");
			truth->calls[me]++;
		}
		for (int i = 0; i < CHECKS; i++) {
			truth->checks[me]++;
			if (differs(memory, code, first))
				truth->mismatches[me]++;
		}
		truth->rounds[me]++;
	}
}
