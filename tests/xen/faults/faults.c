/*
 * Stands between vmitap and Xen's libraries, all of them: named in VMITAP_LIBXENCTRL, it passes each call on, counts it, and at one of them
 * fails it, or ends the process or the domain. Its state lies in memory that is shared with processes that are forked later: whoever has forked one that
 * is to die reads here how far it came.
 *
 * Built for one release: -DLIBXENCTRL="\"libxenctrl.so.4.17\"". tests/xen/dom0/faults.py drives it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum what { NOTHING, FAIL, KILL_BEFORE, KILL_AFTER, END_DOMAIN };
/* What becomes of the domain then; what is not negative is the reason of a shutdown (Xen's public/sched.h). */
enum { DESTROYED = -1, RENAMED = -2 };
/* The result of a failure that only whoever makes a mistake can meet, and that here nobody does. */
enum { CERTAIN = 1 };

/* tests/xen/dom0/faults.py has the same. */
struct state {
	long calls; /* so far */
	long at, what, error; /* what is to happen at which call */
	long done; /* it has */
	long domain, way; /* the domain that ends, and how */
	char last[64], failed[64]; /* the function of the last call, and of the one that failed */
};

static struct state *state;
static const char *const LIBRARIES[] = {
	LIBXENCTRL, "libxenevtchn.so.1", "libxenforeignmemory.so.1", "libxendevicemodel.so.1", "libxenstore.so.4",
};

__attribute__((constructor)) static void begin(void)
{
	state = mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (state == MAP_FAILED)
		abort();
}

struct state *faults_state(void)
{
	return state;
}

static void *find(const char *name)
{
	for (unsigned n = 0; n < sizeof LIBRARIES / sizeof *LIBRARIES; n++) {
		void *library = dlopen(LIBRARIES[n], RTLD_NOW | RTLD_LOCAL);
		void *found = library ? dlsym(library, name) : 0;
		if (found)
			return found;
	}
	abort();
}

void faults_end(int domain, long way)
{
	if (way == RENAMED) {
		void *(*open)(long) = find("xs_open");
		char (*write)(void *, unsigned, const char *, const char *, unsigned) = find("xs_write");
		void (*close)(void *) = find("xs_close");
		char path[64];
		snprintf(path, sizeof path, "/local/domain/%d/name", domain);
		void *store = open(0);
		if (!store || !write(store, 0, path, "renamed", 7))
			abort();
		close(store);
		return;
	}
	void *(*open)(void *, void *, unsigned) = find("xc_interface_open");
	int (*destroy)(void *, unsigned) = find("xc_domain_destroy");
	int (*shut_down)(void *, unsigned, int) = find("xc_domain_shutdown");
	int (*close)(void *) = find("xc_interface_close");
	void *control = open(0, 0, 0);
	if (!control || (way == DESTROYED ? destroy(control, domain) : shut_down(control, domain, way)))
		abort();
	close(control);
}

/* Has a domain that has shut down go on where it was. */
int faults_resume(int domain)
{
	void *(*open)(void *, void *, unsigned) = find("xc_interface_open");
	int (*domctl)(void *, void *) = find("xc_domctl");
	int (*close)(void *) = find("xc_interface_close");
	/* public/domctl.h; the library fills in the version, and the rest is room. */
	struct {
		unsigned cmd, version;
		unsigned short domain, padding[3];
		unsigned char rest[256];
	} request = {.cmd = 27 /* XEN_DOMCTL_resumedomain */, .domain = domain};
	void *control = open(0, 0, 0);
	int result = control ? domctl(control, &request) : -1;
	close(control);
	return result;
}

/* Every function takes its arguments in registers and at most two on the stack, whatever they are: eight words pass all of them on. */
typedef long function(long, long, long, long, long, long, long, long);

static long call(const char *name, function **own, long failed, long a, long b, long c, long d, long e, long f, long g, long h)
{
	if (!*own)
		*own = find(name);
	long number = ++state->calls;
	strncpy(state->last, name, sizeof state->last - 1);
	int now = number == state->at ? state->what : NOTHING;
	state->done |= now != NOTHING;
	if (now == FAIL && failed != CERTAIN) {
		strcpy(state->failed, state->last);
		errno = state->error;
		return failed;
	}
	if (now == END_DOMAIN)
		faults_end(state->domain, state->way);
	if (now == KILL_BEFORE)
		kill(getpid(), SIGKILL);
	long result = (*own)(a, b, c, d, e, f, g, h);
	if (now == KILL_AFTER)
		kill(getpid(), SIGKILL);
	return result;
}

#define FUNCTION(name, failed) \
	long name(long a, long b, long c, long d, long e, long f, long g, long h) \
	{ \
		static function *own; \
		return call(#name, &own, failed, a, b, c, d, e, f, g, h); \
	}
#define NUMBER(name) FUNCTION(name, -1)
#define POINTER(name) FUNCTION(name, 0)
#define CERTAINLY(name) FUNCTION(name, CERTAIN)

POINTER(xc_interface_open)
CERTAINLY(xc_interface_close)
NUMBER(xc_version)
NUMBER(xc_vm_event_get_version)
NUMBER(xc_domain_getinfolist)
NUMBER(xc_domain_pause)
NUMBER(xc_domain_unpause)
NUMBER(xc_domain_maximum_gpfn)
NUMBER(xc_domain_setmaxmem)
NUMBER(xc_domain_populate_physmap_exact)
NUMBER(xc_domain_decrease_reservation_exact)
NUMBER(xc_domain_debug_control)
NUMBER(xc_domain_hvm_getcontext)
NUMBER(xc_domain_hvm_getcontext_partial)
NUMBER(xc_domain_hvm_setcontext)
NUMBER(xc_hvm_param_get)
NUMBER(xc_hvm_param_set)
NUMBER(xc_set_mem_access)
NUMBER(xc_get_mem_access)
NUMBER(xc_altp2m_get_domain_state)
NUMBER(xc_altp2m_set_domain_state)
NUMBER(xc_altp2m_create_view)
NUMBER(xc_altp2m_destroy_view)
NUMBER(xc_altp2m_switch_to_view)
NUMBER(xc_altp2m_set_mem_access)
NUMBER(xc_altp2m_set_mem_access_multi)
NUMBER(xc_altp2m_get_mem_access)
NUMBER(xc_altp2m_change_gfn)
NUMBER(xc_altp2m_get_vcpu_p2m_idx)
POINTER(xc_monitor_enable)
NUMBER(xc_monitor_disable)
NUMBER(xc_monitor_get_capabilities)
NUMBER(xc_monitor_write_ctrlreg)
NUMBER(xc_monitor_mov_to_msr)
NUMBER(xc_monitor_singlestep)
NUMBER(xc_monitor_software_breakpoint)
NUMBER(xc_monitor_debug_exceptions)
NUMBER(xc_monitor_cpuid)
NUMBER(xc_monitor_emul_unimplemented)
NUMBER(xc_monitor_descriptor_access)
NUMBER(xc_monitor_guest_request)
NUMBER(xc_monitor_vmexit)
NUMBER(xc_domctl)
POINTER(xenevtchn_open)
CERTAINLY(xenevtchn_close)
NUMBER(xenevtchn_fd)
NUMBER(xenevtchn_notify)
NUMBER(xenevtchn_bind_interdomain)
NUMBER(xenevtchn_unbind)
NUMBER(xenevtchn_pending)
NUMBER(xenevtchn_unmask)
POINTER(xenforeignmemory_open)
CERTAINLY(xenforeignmemory_close)
POINTER(xenforeignmemory_map)
CERTAINLY(xenforeignmemory_unmap)
POINTER(xendevicemodel_open)
CERTAINLY(xendevicemodel_close)
NUMBER(xendevicemodel_inject_event)
POINTER(xs_open)
CERTAINLY(xs_close)
POINTER(xs_read)
