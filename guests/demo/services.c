/* The licence check and the network card. */
#include "kernel.h"

/* FNV-1a of the one key that is good; which one that is, is left to the reader. */
#define GOOD_KEY 0x3a1538258ec010cfUL

/* 1 if `key` is the good licence key, 0 if not. The application has another one. */
TRACEABLE int check_licence(const char *key)
{
	count(&truth.calls[CALLS_CHECK_LICENCE], 1);
	u64 hash = 0xcbf29ce484222325;
	while (*key)
		hash = (hash ^ (u8)*key++) * 0x100000001b3;
	return hash == GOOD_KEY;
}

/* Sends `n` bytes to an IPv4 address (first octet in the highest byte). There is no wire: they are counted and dropped. */
TRACEABLE long send_packet(u32 destination, const void *buffer, u64 n)
{
	(void)destination;
	(void)buffer;
	count(&truth.calls[CALLS_SEND_PACKET], 1);
	count(&truth.bytes_sent, n);
	return n;
}
