/* System calls: copies arguments in and results out around the kernel's functions. */
#include "kernel.h"
#include "syscall.h"

static int is_user(u64 address, u64 n)
{
	return address + n >= address && address + n <= 0x800000000000;
}

static int copy_path(char *to, u64 from)
{
	return is_user(from, 1) && copy_user_string(to, (const char *)from, SYS_LIMIT) >= 0;
}

static long dispatch(struct frame *frame)
{
	char buffer[SYS_LIMIT];
	u64 a = frame->rdi, b = frame->rsi, c = frame->rdx;
	long result;

	if (c > SYS_LIMIT)
		c = SYS_LIMIT;
	switch (frame->rax) {
	case SYS_OPEN:
		return copy_path(buffer, a) ? open_file(buffer, b) : -EFAULT;
	case SYS_READ:
		result = read_file(a, buffer, c);
		if (result > 0 && (!is_user(b, result) || copy_user((void *)b, buffer, result)))
			return -EFAULT;
		return result;
	case SYS_WRITE:
		if (!is_user(b, c) || copy_user(buffer, (void *)b, c))
			return -EFAULT;
		return write_file(a, buffer, c);
	case SYS_CLOSE:
		return close_file(a);
	case SYS_LICENCE:
		return copy_path(buffer, a) ? check_licence(buffer) : -EFAULT;
	case SYS_SPAWN:
		return copy_path(buffer, a) ? spawn_task(buffer) : -EFAULT;
	case SYS_SEND:
		if (!is_user(b, c) || copy_user(buffer, (void *)b, c))
			return -EFAULT;
		return send_packet(a, buffer, c);
	case SYS_NEXT_ROUND:
		/* A task that was born in a round has nothing to do in it, whatever it says. */
		result = this_cpu()->current->round;
		wait_for_round(a > (u64)result ? a : (u64)result);
		return current_round;
	case SYS_TRAPS:
		return this_cpu()->current->traps;
	case SYS_LICENCE_RESULT:
		count(a ? &truth.licences_accepted : &truth.licences_refused, 1);
		return 0;
	case SYS_EXIT:
		exit_task();
		return 0;
	default:
		return -ENOENT;
	}
}

void syscall_handler(struct frame *frame)
{
	count(&truth.syscalls, 1);
	frame->rax = dispatch(frame);
}
