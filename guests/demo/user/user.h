/* What a user program can ask of the kernel. */
#ifndef USER_H
#define USER_H
#include "../syscall.h"

typedef unsigned long u64;
#define TRACEABLE __attribute__((noinline, noclone, used))
#define OPEN_READ 0x0
#define OPEN_WRITE 0x1
#define OPEN_CREATE 0x40

static inline long syscall3(u64 number, u64 a, u64 b, u64 c)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static inline u64 length(const char *s)
{
	u64 n = 0;
	while (s[n])
		n++;
	return n;
}

static inline int sys_open(const char *path, u64 flags) { return syscall3(SYS_OPEN, (u64)path, flags, 0); }
static inline long sys_read(int fd, void *buffer, u64 n) { return syscall3(SYS_READ, fd, (u64)buffer, n); }
static inline long sys_write(int fd, const void *buffer, u64 n) { return syscall3(SYS_WRITE, fd, (u64)buffer, n); }
static inline int sys_close(int fd) { return syscall3(SYS_CLOSE, fd, 0, 0); }
static inline int sys_licence(const char *key) { return syscall3(SYS_LICENCE, (u64)key, 0, 0); }
static inline int sys_spawn(const char *path) { return syscall3(SYS_SPAWN, (u64)path, 0, 0); }
static inline long sys_send(u64 to, const void *buffer, u64 n) { return syscall3(SYS_SEND, to, (u64)buffer, n); }
static inline u64 sys_next_round(u64 done) { return syscall3(SYS_NEXT_ROUND, done, 0, 0); }
static inline u64 sys_traps(void) { return syscall3(SYS_TRAPS, 0, 0, 0); }
static inline void sys_licence_result(u64 accepted) { syscall3(SYS_LICENCE_RESULT, accepted, 0, 0); }
static inline void say(const char *text) { sys_write(1, text, length(text)); }

/* Reads at most `n` bytes of the file; what open or read gave. */
static inline long read_whole(const char *path, char *buffer, u64 n)
{
	int fd = sys_open(path, OPEN_READ);
	if (fd < 0)
		return fd;
	long got = sys_read(fd, buffer, n);
	sys_close(fd);
	return got;
}

#define ADDRESS(a, b, c, d) ((u64)(a) << 24 | (b) << 16 | (c) << 8 | (d))
#endif
