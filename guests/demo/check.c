/* The integrity checker: does the kernel's text read as it was built, whichever way it is read? */
#include "kernel.h"

#define MAX_TEXT (16 * PAGE)
#define FNV_START 0xcbf29ce484222325UL
#define FNV_PRIME 0x100000001b3UL

u64 hash_xadd(void *text, u64 n);
u64 hash_movups(const void *text, u64 n);
u64 count_equal(const void *text, u64 n, const void *copy);
u64 count_int3(const void *text, u64 n);

/* What build.rs computed from the finished text, by kind; READ_COMPARE is left to the length. In reads.S. */
extern const u64 golden_table[READ_KINDS];

struct truth truth __attribute__((aligned(4096), section(".truth")));
static u64 kinds;
static u8 boot_copy[MAX_TEXT] __attribute__((aligned(4096)));
static u8 copies[MAX_VCPUS][MAX_TEXT] __attribute__((aligned(4096)));

static inline u64 fnv(u64 hash, u64 value)
{
	return (hash ^ value) * FNV_PRIME;
}

static u64 hash_bytes(const u8 *text, u64 n)
{
	u64 hash = FNV_START;
	for (u64 i = 0; i < n; i++)
		hash = fnv(hash, *(const volatile u8 *)(text + i));
	return hash;
}

/* 8 bytes at `first`, then every `step` bytes, while they fit. */
static u64 hash_words(const u8 *text, u64 n, u64 first, u64 step)
{
	u64 hash = FNV_START;
	for (u64 at = first; at + 8 <= n; at += step)
		hash = fnv(hash, *(const volatile u64 *)(text + at));
	return hash;
}

static void movsb(void *to, const void *from, u64 n)
{
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
}

static void movsq(void *to, const void *from, u64 n)
{
	n /= 8;
	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n)::"memory");
}

/* `wanted`: a bit for each kind of read that is to be done. */
void check_init(u64 wanted)
{
	kinds = wanted;
	u64 n = text_end - text_start;
	if (n > MAX_TEXT)
		panic("text larger than its copies", n, MAX_TEXT);
	truth.text_start = (u64)text_start;
	truth.text_end = (u64)text_end;
	truth.text_pa = (u64)text_start - KBASE;
	for (int kind = 0; kind < READ_KINDS; kind++)
		truth.golden[kind] = golden_table[kind];
	truth.golden[READ_COMPARE] = n;
	movsb(boot_copy, text_start, n);
}

static int is_wanted(enum read_kind kind)
{
	return kinds >> kind & 1;
}

static void judge(enum read_kind kind, u64 hash, u64 vcpu)
{
	truth.hash[kind] = hash;
	if (hash != truth.golden[kind]) {
		count(&truth.mismatches[kind], 1);
		count(&truth.vcpu_mismatches[vcpu], 1);
	}
}

/* Reads the whole text in every way and counts what is not as it must be. */
TRACEABLE void check_integrity(void)
{
	const u8 *text = (const u8 *)text_start;
	u64 n = text_end - text_start;
	u64 vcpu = this_cpu()->index;
	u8 *copy = copies[vcpu];

	if (is_wanted(READ_BYTE))
		judge(READ_BYTE, hash_bytes(text, n), vcpu);
	if (is_wanted(READ_ALIGNED))
		judge(READ_ALIGNED, hash_words(text, n, 0, 8), vcpu);
	if (is_wanted(READ_UNALIGNED))
		judge(READ_UNALIGNED, hash_words(text, n, 1, 8), vcpu);
	if (is_wanted(READ_CROSSING))
		judge(READ_CROSSING, hash_words(text, n, PAGE - 4, PAGE), vcpu);
	if (is_wanted(READ_MOVSB)) {
		movsb(copy, text, n);
		judge(READ_MOVSB, hash_words(copy, n, 0, 8), vcpu);
	}
	if (is_wanted(READ_MOVSQ)) {
		movsq(copy, text, n);
		judge(READ_MOVSQ, hash_words(copy, n, 0, 8), vcpu);
	}
	if (is_wanted(READ_XADD))
		judge(READ_XADD, hash_xadd(physical(truth.text_pa), n), vcpu);
	if (is_wanted(READ_MOVUPS))
		judge(READ_MOVUPS, hash_movups(text, n), vcpu);
	if (is_wanted(READ_COMPARE))
		judge(READ_COMPARE, count_equal(text, n, boot_copy), vcpu);
	if (is_wanted(READ_SCAN))
		judge(READ_SCAN, count_int3(text, n), vcpu);
	count(&truth.checks, 1);
	count(&truth.vcpu_checks[vcpu], 1);
}

u64 mismatches_seen(void)
{
	u64 sum = 0;
	for (int kind = 0; kind < READ_KINDS; kind++)
		sum += truth.mismatches[kind];
	return sum;
}
