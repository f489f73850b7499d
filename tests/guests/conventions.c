/* Functions with eight arguments, of both calling conventions: where those are is what the compiler says. */

typedef unsigned long long u64;

#define EIGHT u64 a, u64 b, u64 c, u64 d, u64 e, u64 f, u64 g, u64 h
#define SYSV __attribute__((noinline, noclone, noipa, sysv_abi))
#define MS __attribute__((noinline, noclone, noipa, ms_abi))

u64 sysv_result, ms_result, deep_result;

SYSV u64 sysv_eight(EIGHT)
{
	return a + 10 * b + 100 * c + 1000 * d + 10000 * e + 100000 * f + 1000000 * g + 10000000 * h;
}

MS u64 ms_eight(EIGHT)
{
	return a + 10 * b + 100 * c + 1000 * d + 10000 * e + 100000 * f + 1000000 * g + 10000000 * h;
}

/* Calls itself: five arguments, one of them on the stack. */
MS u64 ms_deep(u64 depth, u64 b, u64 c, u64 d, u64 sum)
{
	return depth ? ms_deep(depth - 1, b, c, d, sum + depth) + 1 : sum;
}

void calls(void)
{
	for (u64 n = 0; n < 3; n++) {
		sysv_result = sysv_eight(n + 1, 2, 3, 4, 5, 6, 7, 8);
		ms_result = ms_eight(n + 1, 2, 3, 4, 5, 6, 7, 8);
	}
	deep_result = ms_deep(4, 0, 0, 0, 100);
}
