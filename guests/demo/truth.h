/*
 * The truth page: what the guest itself counted. Symbol `truth`, one page, read after the run (or during it) by whoever wants to
 * know what really happened. All fields are little-endian u64; the layout only grows at its end, with a new version.
 */
#ifndef TRUTH_H
#define TRUTH_H

#define TRUTH_MAGIC 0x6874757274746d76 /* "vmttruth" */
#define TRUTH_VERSION 1
#define TRUTH_FINISHED 0x64656873696e6966 /* "finished" */

/* Ways in which the kernel's text is read. The same order and the same algorithms as tests/guests/reads.inc and build.rs. */
enum read_kind {
	READ_BYTE, /* every byte */
	READ_ALIGNED, /* 8 bytes at 0, 8, 16 ... */
	READ_UNALIGNED, /* 8 bytes at 1, 9, 17 ... while they fit */
	READ_CROSSING, /* 8 bytes at every page boundary inside, from 4 bytes before it */
	READ_MOVSB, /* rep movsb into a buffer, which is then hashed as READ_ALIGNED */
	READ_MOVSQ, /* rep movsq, alike */
	READ_XADD, /* lock xadd of 0 through a writable alias, as READ_ALIGNED */
	READ_MOVUPS, /* 16 bytes at 8, 24 ... while they fit, low word first */
	READ_COMPARE, /* repe cmpsb with a copy made at boot: how many bytes are equal */
	READ_SCAN, /* repne scasb for 0xcc: how many there are */
	READ_KINDS
};

/* Functions that count their calls, as indices of truth.calls. */
enum counted_function {
	CALLS_OPEN_FILE,
	CALLS_READ_FILE,
	CALLS_WRITE_FILE,
	CALLS_CLOSE_FILE,
	CALLS_CHECK_LICENCE,
	CALLS_SPAWN_TASK,
	CALLS_SEND_PACKET,
	CALLS_FUNCTIONS
};

#define TRUTH_VCPUS 8

#ifndef __ASSEMBLER__
struct truth {
	unsigned long magic; /* 0x000 */
	unsigned long version; /* 0x008 */
	unsigned long vcpus; /* 0x010 vCPUs that have started */
	unsigned long rounds_wanted; /* 0x018 */
	unsigned long rounds_done; /* 0x020 */
	unsigned long verdict; /* 0x028: 0 not yet, 1 no tampering seen, 2 tampering seen, 3 not checked */
	unsigned long finished; /* 0x030: TRUTH_FINISHED after the last instruction that matters */
	unsigned long text_start; /* 0x038 virtual address of the checked text */
	unsigned long text_end; /* 0x040 */
	unsigned long text_pa; /* 0x048 physical address of text_start */
	unsigned long checks; /* 0x050 integrity checks, all vCPUs */
	unsigned long syscalls; /* 0x058 */
	unsigned long preemptions; /* 0x060 user code interrupted by the timer and another task run instead */
	unsigned long page_faults_user; /* 0x068 faults of ring 3 that got a page */
	unsigned long page_faults_fixed; /* 0x070 faults of the kernel on a user's bad pointer */
	unsigned long breakpoints; /* 0x078 the guest's own INT3s, seen by its own handler */
	unsigned long licences_accepted; /* 0x080 as ring 3 saw it */
	unsigned long licences_refused; /* 0x088 */
	unsigned long bytes_sent; /* 0x090 */
	unsigned long go; /* 0x098 not 0: a guest that was told to wait goes on; written by the host */
	unsigned long reserved[12]; /* 0x0a0 */
	unsigned long calls[16]; /* 0x100 by enum counted_function */
	unsigned long golden[16]; /* 0x180 by enum read_kind: what the hashes must be, computed when the image was built */
	unsigned long hash[16]; /* 0x200 what the last check found */
	unsigned long mismatches[16]; /* 0x280 how often it was not what it must be */
	unsigned long vcpu_checks[TRUTH_VCPUS]; /* 0x300 */
	unsigned long vcpu_mismatches[TRUTH_VCPUS]; /* 0x340 */
	unsigned long vcpu_ticks[TRUTH_VCPUS]; /* 0x380 timer interrupts */
	unsigned long vcpu_switches[TRUTH_VCPUS]; /* 0x3c0 task switches */
};

_Static_assert(sizeof(struct truth) == 0x400, "the layout is documented and read by others");
#endif
#endif
