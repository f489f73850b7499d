/* Text out of port 0xE9, and the C library's four functions that are needed. */
#include "kernel.h"

void *memcpy(void *to, const void *from, u64 n)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
	return start;
}

void *memset(void *to, int value, u64 n)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
	return start;
}

u64 string_length(const char *s)
{
	u64 n = 0;
	while (s[n])
		n++;
	return n;
}

int string_equal(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

int starts_with(const char *s, const char *prefix)
{
	while (*prefix && *s == *prefix)
		s++, prefix++;
	return !*prefix;
}

static spinlock console_lock;

void console_write(const char *text, u64 n)
{
	u64 flags = lock(&console_lock);
	while (n--)
		__asm__ volatile("outb %0, $0xe9" ::"a"(*text++));
	unlock(&console_lock, flags);
}

void print(const char *text)
{
	console_write(text, string_length(text));
}

void print_number(u64 value)
{
	char digits[20];
	u64 at = sizeof digits;
	do
		digits[--at] = '0' + value % 10;
	while (value /= 10);
	console_write(digits + at, sizeof digits - at);
}

static void print_hex(u64 value)
{
	static const char hex[] = "0123456789abcdef";
	char digits[17] = " ";
	for (int i = 0; i < 16; i++)
		digits[i + 1] = hex[value >> (60 - 4 * i) & 15];
	console_write(digits, sizeof digits);
}

void panic(const char *why, u64 first, u64 second)
{
	print("kernel panic: ");
	print(why);
	print_hex(first);
	print_hex(second);
	print("\n");
	stopping = 1;
	wake_others();
	halt_forever();
}
