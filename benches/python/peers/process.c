/*
 * The ordinary process that debuggers tap in bench_table.py: calls f in a loop as tests/guests/calls.S does, and looks at f's code at the end.
 * `process CALLS` prints how often f was called, the nanoseconds of processor time that took, and what its code is.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef unsigned long u64;

u64 f_count, f_sum;

__attribute__((noinline, noclone, noipa, aligned(4096))) u64 f(u64 i)
{
	f_sum += i;
	f_count++;
	return i * 3 + 1;
}

/* The first bytes of f, as the process itself reads them. */
static u64 code(void)
{
	volatile unsigned char *at = (volatile unsigned char *)f;
	u64 sum = 0;
	for (int n = 0; n < 16; n++)
		sum = sum * 257 + at[n];
	return sum;
}

/* Comes behind the last call: where a peer that lives in this process says how many it has seen. */
__attribute__((noinline, noclone, noipa)) void done(void)
{
	__asm__ volatile(".fill 32, 1, 0x90");
}

static u64 now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return time.tv_sec * 1000000000ul + time.tv_nsec;
}

int main(int count, char **words)
{
	u64 calls = count > 1 ? strtoul(words[1], NULL, 0) : 1;
	f(0);
	u64 begin = now();
	for (u64 i = 1; i <= calls; i++)
		if (f(i) != 3 * i + 1)
			return 1;
	u64 elapsed = now() - begin;
	done();
	printf("called %lu ns %lu code %lu\n", f_count - 1, elapsed, code());
	return 0;
}
