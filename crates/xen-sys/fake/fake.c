/* A stand-in for Xen's libraries: one domain with memory, views, a ring and vCPUs that know a handful of instructions. It behaves as Xen does
 * where a driver can tell the difference (xen/arch/x86/mm/p2m.c, vm_event.c, hvm/monitor.c), counts every call, and fails the ones it is told to.
 *
 * Built with -DVM_EVENT=6 or 7 and -DMINOR=14..22; -DWITHOUT_x leaves a function out. Virtual addresses are physical ones if CR3 is 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define GUEST_PAGES 64
#define MFNS 2048
#define GFNS 1024
#define MAX_VCPUS 4
#define MAX_VIEWS 10
#define DOMAIN 7
#define R 1
#define W 2
#define X 4
#define ERR(number) (errno = (number), -1)

enum { MEM_ACCESS = 1, WRITE_CTRLREG = 4, BREAKPOINT = 6, SINGLESTEP = 7, CPUID = 10, DESCRIPTOR = 13, UNIMPLEMENTED = 14, VMEXIT = 15 };
enum { PAUSED = 1, EMULATE = 4, NOWRITE = 8, TOGGLE = 16, DENY = 64, ALTP2M = 128, SET_REGS = 256, INSN_DATA = 512, FAST = 2048 };

/* vm_event.h */
struct regs {
    uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r[8], rflags, dr6, dr7, rip, cr0, cr2, cr3, cr4, sysenter[3], efer, star, lstar, gdtr_base;
#if VM_EVENT >= 7
    uint64_t npt_base, vmtrace_pos;
#endif
    uint32_t base[4];
    uint64_t fs_base, gs_base;
    uint32_t seg[6];
    uint64_t shadow_gs;
    uint16_t gdtr_limit, sel[6], pad;
};
struct event {
    uint32_t version, flags, reason, vcpu;
    uint16_t view, pad[3];
    union {
        uint64_t raw[4];
        struct { uint64_t gfn, offset, gla; uint32_t flags, pad; } access;
        struct { uint64_t gfn, pending; uint32_t len; uint8_t type; } debug;
        struct { uint32_t len, leaf, subleaf; } cpuid;
        struct { uint32_t index, pad; uint64_t new_value, old_value; } cr;
        uint16_t back;
    } u;
    union { struct regs regs; uint8_t insn[16]; } data;
};
struct ring { uint32_t req_prod, req_event, rsp_prod, rsp_event, pad[12]; struct event slot[8]; };
_Static_assert(sizeof(struct event) == (VM_EVENT >= 7 ? 400 : 384), "the layout of the version");

struct vcpu {
    struct regs regs;
    int view, held, single_step, fast, fast_back, down;
    uint32_t emulate;
    uint8_t insn[16];
    uint64_t event_rip;
    long int3s, uds, injected, misplaced;
};
struct entry { int valid, access; long mfn; };

static struct {
    int memfd, event_fd, pauses, maps;
    uint8_t *memory;
    long host[GFNS], mfns, host_access[GFNS], max_pages;
    struct entry views[MAX_VIEWS][GFNS];
    int view_used[MAX_VIEWS];
    long low[MAX_VIEWS], high[MAX_VIEWS];
    struct vcpu vcpu[MAX_VCPUS];
    struct ring *ring;
    uint32_t req_prod, rsp_cons;
    struct event answers[256];
    int answer_count, bound;
    uint64_t ignored;
    int bp, step, cpuid, unimplemented, cr, descriptors, exits, requests, ports, debug, param_set, altp2m_on, unsupported_insn;
    bool was_there[GFNS];                                      /* max_mapped_pfn never shrinks */
    long wiped, ring_full, exposures;
    int automatic, always;
} d;

/* --- what a test sets, asks and breaks --- */
struct knob { const char *name; long value; };
static struct knob knobs[] = {
    {"hvm", 1}, {"hap", 1}, {"single_step", 1}, {"altp2m", 1}, {"altp2m_line", 1}, {"altp2m_param", MINOR >= 19 ? 2 : 0}, {"busy", 0}, {"dying", 0}, {"gone", 0},
    {"version_errno", 0}, {"open_errno", 0}, {"vcpus", 1}, {"named", 1}, {"emul_monitor", 1}, {"shutdown", 0}, {"version", VM_EVENT}, {"far_page_first", 0}, {0, 0},
};
static struct { const char *name; long count, fail_at; int error; } calls[128];
/* Of all calls, whatever they are: at one of them something happens. */
#define MOST_CALLS 4096
static struct { long total, fail_at, set_at, value, die_at; int error, dead; const char *knob, *names[MOST_CALLS]; void (*last_will)(void); } every;

long *fake_knob(const char *name) { for (struct knob *k = knobs; k->name; k++) if (!strcmp(k->name, name)) return &k->value; abort(); }
static long knob(const char *name) { return *fake_knob(name); }
#define VCPUS ((int)knob("vcpus"))
static int find(const char *name) { int i = 0; while (calls[i].name && strcmp(calls[i].name, name)) i++; if (!calls[i].name) calls[i].name = strdup(name); return i; }
long fake_calls(const char *name) { return calls[find(name)].count; }
void fake_forget_calls(void) { for (int i = 0; calls[i].name; i++) calls[i].count = 0; }
void fake_fail(const char *name, long nth, int error) { int i = find(name); calls[i].fail_at = calls[i].count + nth; calls[i].error = error; }
long fake_total(void) { return every.total; }
const char *fake_name(long nth) { return nth > 0 && nth <= every.total && nth < MOST_CALLS ? every.names[nth] : 0; }
void fake_fail_call(long nth, int error) { every.fail_at = nth; every.error = error; }
void fake_set_at(long nth, const char *name, long value) { every.set_at = nth; every.knob = strdup(name); every.value = value; }
int fake_run(int v, int n);
/* From a call on nothing is done any more, as by a process that has ended; `last_will` is called when it ends. 0: it lives (again). */
void fake_die_at(long nth, void (*last_will)(void)) { every.die_at = nth; every.last_will = last_will; every.dead = 0; }
/* 0, or -1 if the call is to fail. */
static int count(const char *name)
{
    int i = find(name);
    calls[i].count++;
    if (++every.total < MOST_CALLS) every.names[every.total] = calls[i].name;
    /* The guest runs all the time, not only while the tool waits. */
    for (int v = 0; v < VCPUS; v++) if (d.always) fake_run(v, d.always);
    if (every.total == every.set_at) *fake_knob(every.knob) = every.value;
    if (every.total == every.die_at) { every.dead = 1; every.last_will(); }
    if (every.dead) return ERR(EIO);
    if (every.total == every.fail_at) return ERR(every.error);
    return calls[i].count == calls[i].fail_at ? ERR(calls[i].error) : 0;
}
static int enter(const char *name)
{
    if (count(name)) return -1;
    if (knob("gone") && strncmp(name, "xenforeignmemory_unmap", 22) && strncmp(name, "xenevtchn", 9)) return ERR(ESRCH);
    return 0;
}
#define ENTER() do { if (enter(__func__)) return -1; } while (0)

static void boot(void)
{
    if (d.memory) return;
    d.memfd = memfd_create("fake", 0);
    if (ftruncate(d.memfd, (long)MFNS * PAGE)) abort();
    d.memory = mmap(0, (long)MFNS * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, d.memfd, 0);
    d.event_fd = eventfd(0, EFD_NONBLOCK);
    for (int g = 0; g < GFNS; g++) { d.host[g] = g < GUEST_PAGES ? d.mfns++ : -1; d.host_access[g] = 7; }
    d.max_pages = GUEST_PAGES;
    for (int v = 0; v < MAX_VCPUS; v++) { d.vcpu[v].regs.efer = 0x500; d.vcpu[v].regs.seg[0] = 0xa9bu << 20; d.vcpu[v].regs.rflags = 2; }
    d.view_used[0] = 1;
}
uint8_t *fake_memory(long gfn) { boot(); return d.memory + d.host[gfn] * PAGE; }
struct regs *fake_regs(int v) { boot(); return &d.vcpu[v].regs; }
long fake_state(const char *what, long i)
{
    struct vcpu *v = &d.vcpu[i & 3];
    if (!strcmp(what, "view")) return v->view;
    if (!strcmp(what, "held")) return v->held;
    if (!strcmp(what, "single_step")) return v->single_step;
    if (!strcmp(what, "int3s")) return v->int3s;
    if (!strcmp(what, "uds")) return v->uds;
    if (!strcmp(what, "injected")) return v->injected;
    if (!strcmp(what, "misplaced")) return v->misplaced;
    if (!strcmp(what, "down")) return v->down;
    if (!strcmp(what, "pauses")) return d.pauses;
    if (!strcmp(what, "maps")) return d.maps;
    if (!strcmp(what, "listening")) return d.ring != 0;
    if (!strcmp(what, "altp2m")) return d.altp2m_on;
    if (!strcmp(what, "exits")) return d.exits;
    if (!strcmp(what, "monitors")) return d.bp + d.step + d.cpuid + d.unimplemented + d.cr + d.descriptors + d.requests + d.ports + d.debug;
    if (!strcmp(what, "ignored")) return d.ignored;
    if (!strcmp(what, "wiped")) return d.wiped;
    if (!strcmp(what, "exposures")) return d.exposures;
    if (!strcmp(what, "bound")) return d.bound;
    if (!strcmp(what, "ring_full")) return d.ring_full;
    if (!strcmp(what, "max_pages")) return d.max_pages;
    if (!strcmp(what, "answers")) return d.answer_count;
    if (!strcmp(what, "owed")) return d.ring ? (int32_t)(d.req_prod - d.rsp_cons) : 0;
    if (!strcmp(what, "views")) { long n = 0; for (int k = 1; k < MAX_VIEWS; k++) n += d.view_used[k]; return n; }
    if (!strcmp(what, "populated")) { long n = 0; for (int g = 0; g < GFNS; g++) n += d.host[g] >= 0; return n; }
    abort();
}
const struct event *fake_answer(int i) { return &d.answers[i]; }
void fake_ring(uint32_t req_prod) { __atomic_store_n(&d.ring->req_prod, req_prod, __ATOMIC_RELEASE); }
void fake_automatic(int instructions) { d.automatic = instructions; }
void fake_always(int instructions) { d.always = instructions; }
void fake_lose_emulator(int lost) { d.unsupported_insn = lost; }

/* --- the machine --- */
static struct entry *effective(int view, long gfn)
{
    static struct entry host;
    if (gfn < 0 || gfn >= GFNS || d.host[gfn] < 0) return 0;
    if (view && d.views[view][gfn].valid) return &d.views[view][gfn];
    host = (struct entry){1, d.host_access[gfn], d.host[gfn]};
    return &host;
}
int fake_access(int view, long gfn) { struct entry *e = effective(view, gfn); return e ? e->access : -1; }
int fake_byte(int view, long pa) { struct entry *e = effective(view, pa >> 12); return e ? d.memory[e->mfn * PAGE + (pa & 4095)] : -1; }
static void push(int v, struct event *e, int paused)
{
    e->version = knob("version"); e->vcpu = v; e->data.regs = d.vcpu[v].regs;
    if (d.altp2m_on) { e->flags |= ALTP2M; e->view = d.vcpu[v].view; }
    if (paused) { e->flags |= PAUSED; d.vcpu[v].held = 1; d.vcpu[v].event_rip = d.vcpu[v].regs.rip; }
    if (!d.ring || d.req_prod - d.rsp_cons >= 8) { d.ring_full++; return; }
    d.ring->slot[d.req_prod & 7] = *e;
    __atomic_store_n(&d.ring->req_prod, ++d.req_prod, __ATOMIC_RELEASE);
    if (write(d.event_fd, &(uint64_t){1}, 8) < 0) abort();
}
/* An event of any kind, as it is. */
void fake_push(int v, uint32_t reason, int paused) { struct event e = {.reason = reason}; push(v, &e, paused); }
/* An event that is only bytes. */
void fake_push_raw(const void *bytes)
{
    if (!d.ring || d.req_prod - d.rsp_cons >= 8) { d.ring_full++; return; }
    struct event *e = &d.ring->slot[d.req_prod & 7];
    memcpy(e, bytes, sizeof *e);
    if (e->vcpu < (uint32_t)VCPUS && e->flags & PAUSED) d.vcpu[e->vcpu].held = 1;
    __atomic_store_n(&d.ring->req_prod, ++d.req_prod, __ATOMIC_RELEASE);
    if (write(d.event_fd, &(uint64_t){1}, 8) < 0) abort();
}
static int denied(int v, long va, int access)
{
    struct entry *e = effective(d.vcpu[v].view, va >> 12);
    if (e && (e->access & access) == access) return 0;
    /* Nobody listens: Xen takes the restriction away (p2m_mem_access_check). */
    if (e && !d.ring) { e->access = 7; if (!d.vcpu[v].view) d.host_access[va >> 12] = 7; d.exposures++; return 0; }
    struct event event = {.reason = MEM_ACCESS, .u.access = {va >> 12, va & 4095, va, access | 8 | 16, 0}};
    push(v, &event, 1);
    return 1;
}
static long walk(int v, long va)
{
    uint64_t table = d.vcpu[v].regs.cr3;
    if (!table) return va;
    for (int level = 4; level; level--) {
        uint64_t entry; memcpy(&entry, fake_memory(table >> 12) + ((va >> (3 + 9 * level)) & 511) * 8, 8);
        if (!(entry & 1)) return -1;
        table = entry & 0xffffffffff000;
    }
    return table | (va & 4095);
}
/* Executes one instruction: of `bytes`, or of what the vCPU's view has. By the emulator: from the default view, and nothing is denied. */
static int execute(int v, const uint8_t *bytes, int emulated, int nowrite)
{
    struct vcpu *c = &d.vcpu[v]; struct regs *r = &c->regs; uint8_t code[16];
    int view = emulated ? 0 : c->view; long pa = walk(v, r->rip);
    if (!emulated && denied(v, pa, X)) return 0;
    for (int i = 0; i < 16; i++) code[i] = bytes ? bytes[i] : (uint8_t)fake_byte(view, pa + i);
    long to = -1; int len = 1, size = 1; uint64_t value = 0;
    if (code[0] == 0xcc) {
        if (emulated) { c->uds++; return 1; }
        if (!d.bp) { c->int3s++; r->rip++; return 1; }
        struct event e = {.reason = BREAKPOINT, .u.debug = {pa >> 12, 0, 1, 6}};
        push(v, &e, 1);
        return 0;
    }
    if (code[0] == 0x0f && code[1] == 0xa2 && !emulated) {
        uint32_t leaf = r->rax, subleaf = r->rcx; r->rax = 0x16; r->rbx = 0x756e6547; r->rcx = 0x6c65746e; r->rdx = 0x49656e69;
        struct event e = {.reason = CPUID, .u.cpuid = {2, leaf, subleaf}};
        if (d.cpuid) { push(v, &e, 1); return 0; }
        r->rip += 2; return 1;
    }
    if (emulated && d.unsupported_insn) {
        struct event e = {.reason = UNIMPLEMENTED};
        if (d.unimplemented) push(v, &e, 1); else c->uds++;
        return 0;
    }
    switch (code[0]) {
    case 0x90: case 0xfa: break;                                               /* nop, cli */
    case 0xeb: len = 2 + (int8_t)code[1]; break;                               /* jmp */
    case 0x5d:                                                                 /* pop rbp */
        pa = walk(v, r->rsp); if (!emulated && denied(v, pa, R)) return 0;
        memcpy(&r->rbp, d.memory + effective(view, pa >> 12)->mfn * PAGE + (pa & 4095), 8); r->rsp += 8; break;
    case 0x55: to = r->rsp - 8; size = 8; value = r->rbp; break;               /* push rbp */
    case 0x88: len = 2; to = r->rbx; value = r->rax & 255; break;              /* mov [rbx], al */
    case 0x8a: len = 2;                                                        /* mov al, [rbx] */
        pa = walk(v, r->rbx); if (!emulated && denied(v, pa, R)) return 0;
        r->rax = (r->rax & ~255ul) | (uint8_t)fake_byte(view, pa); break;
    case 0xf3: len = 2; to = r->rdi; value = r->rax & 255; break;              /* rep stosb, one round */
    default: c->uds++; return 1;
    }
    if (to >= 0) {
        /* Where it crosses a border, which page is denied first is the processor's business. */
        long first = walk(v, to), last = walk(v, to + size - 1), other = last >> 12 != first >> 12 ? last & ~4095l : first;
        int far = !!knob("far_page_first");
        if (!emulated && (denied(v, far ? other : first, W) || denied(v, far ? first : other, W))) return 0;
        for (int i = 0; i < size && !nowrite; i++) {
            pa = walk(v, to + i); struct entry *e = effective(view, pa >> 12);
            if (e) d.memory[e->mfn * PAGE + (pa & 4095)] = value >> 8 * i;
        }
    }
    if (code[0] == 0x55) r->rsp -= 8;
    if (code[0] == 0xf3) { r->rdi++; if (--r->rcx) return 1; }
    r->rip += len;
    return 1;
}
/* Lets a vCPU execute up to n instructions; how many it did before it was held. */
int fake_run(int v, int n)
{
    struct vcpu *c = &d.vcpu[v]; int done = 0;
    boot();
    while (done < n && !c->held && !d.pauses && !c->down && !knob("gone") && !knob("dying") && !knob("shutdown")) {
        if (c->emulate) { uint32_t f = c->emulate; c->emulate = 0; c->misplaced += c->regs.rip != c->event_rip; execute(v, f & INSN_DATA && !(f & NOWRITE) ? c->insn : 0, 1, !!(f & NOWRITE)); done++; continue; }
        if (!execute(v, 0, 0, 0)) break;
        done++;
        if (c->single_step && knob("single_step")) {
            if (c->fast) { if (d.step) { c->view = c->fast_back; c->fast = c->single_step = 0; } continue; }
            if (!d.step) continue;
            struct event e = {.reason = SINGLESTEP, .u.raw = {c->regs.rip >> 12}};
            push(v, &e, 1);
        }
    }
    return done;
}
/* vm_event_resume */
static void resume(void)
{
    while (d.ring && d.rsp_cons != __atomic_load_n(&d.ring->rsp_prod, __ATOMIC_ACQUIRE)) {
        struct event a = d.ring->slot[d.rsp_cons++ & 7];
        d.answers[d.answer_count++ & 255] = a;
        if (a.version != VM_EVENT || a.vcpu >= (uint32_t)VCPUS) continue;
        struct vcpu *c = &d.vcpu[a.vcpu];
        if (!c->held) continue;
        c->emulate = 0;
        if (a.flags & EMULATE) {
            struct entry *e = effective(c->view, a.u.access.gfn);
            if (a.reason == MEM_ACCESS && e && (a.u.access.flags & 7 & ~e->access)) c->emulate = a.flags;
            if (a.reason == DESCRIPTOR) c->emulate = a.flags;
            if (a.reason == BREAKPOINT && a.flags & INSN_DATA) { c->emulate = a.flags; memcpy(c->insn, a.data.insn, 16); }
        }
        if (a.flags & TOGGLE) c->single_step = knob("single_step") ? !c->single_step : 0;
        else if (a.flags & FAST && knob("single_step")) { c->single_step = c->fast = 1; c->fast_back = a.u.back; }
        if (a.flags & ALTP2M && a.view < MAX_VIEWS && d.view_used[a.view]) c->view = a.view;
        if (a.flags & SET_REGS) { struct regs old = c->regs; memcpy(&c->regs, &a.data.regs, 128 + 8); c->regs.rip = a.data.regs.rip; c->regs.dr6 = old.dr6; }
        if (a.flags & PAUSED) c->held = 0;
    }
}

/* --- libxenctrl --- */
struct logger { void (*message)(struct logger *, int, int, const char *, const char *, va_list); };
static struct logger *logger;
static void say(const char *format, ...) { va_list a; va_start(a, format); if (logger) logger->message(logger, 8, EACCES, "xencall", format, a); va_end(a); }
void *xc_interface_open(struct logger *l, void *b, unsigned f) { (void)b; (void)f; logger = l; boot(); if (enter(__func__)) return 0; if (knob("open_errno")) { errno = knob("open_errno"); say("cannot open %s", "privcmd"); return 0; } return &d; }
int xc_interface_close(void *x) { (void)x; enter(__func__); return 0; }
int xc_version(void *x, int cmd, char *out) { (void)x; ENTER(); if (cmd == 0) return 4 << 16 | MINOR; if (cmd == 1) strcpy(out, ".5"); if (cmd == 9) strcpy(out, knob("altp2m_line") ? "loglvl=all altp2m=1" : "loglvl=all"); return 0; }
int xc_vm_event_get_version(void *x) { (void)x; ENTER(); if (knob("version_errno")) return ERR(knob("version_errno")); return knob("version"); }
struct info { uint16_t domain, pad; uint32_t flags; uint64_t tot, max, out, shr, paged, shared, time; uint32_t online, max_vcpu, ssid; uint8_t handle[16]; uint32_t pool; uint64_t rest[MINOR >= 16 ? 2 : 1]; };
int xc_domain_getinfolist(void *x, uint32_t first, unsigned max, struct info *out)
{
    (void)x; if (count(__func__)) return -1;
    if (!max || first > DOMAIN || (first && knob("gone"))) return 0;
    memset(out, 0, sizeof *out);
    if (!first) { out->max_vcpu = 0; return 1; }
    out->domain = DOMAIN; out->tot = GUEST_PAGES; out->max = d.max_pages; out->max_vcpu = VCPUS - 1;
    out->flags = (knob("dying") ? 1 : 0) | (knob("hvm") ? 2 : 0) | (knob("shutdown") ? 4 | (knob("shutdown") - 1) << 16 : 0) | (d.pauses ? 8 : 0) | (knob("hap") ? 256 : 0);
    return 1;
}
int xc_domain_pause(void *x, uint32_t dom) { (void)x; (void)dom; ENTER(); d.pauses++; return 0; }
int xc_domain_unpause(void *x, uint32_t dom) { (void)x; (void)dom; ENTER(); if (!d.pauses) return ERR(EINVAL); d.pauses--; return 0; }
int xc_domain_maximum_gpfn(void *x, uint32_t dom, unsigned long *out) { (void)x; (void)dom; ENTER(); *out = GUEST_PAGES - 1; for (int g = 0; g < GFNS; g++) if (d.host[g] >= 0 || d.was_there[g]) *out = g; return 0; }
int xc_domain_setmaxmem(void *x, uint32_t dom, uint64_t kib) { (void)x; (void)dom; ENTER(); d.max_pages = kib / 4; return 0; }
int xc_domain_populate_physmap_exact(void *x, uint32_t dom, unsigned long n, unsigned order, unsigned f, unsigned long *g)
{
    (void)x; (void)dom; (void)f; ENTER();
    if (order || fake_state("populated", 0) + (long)n > d.max_pages) return ERR(ENOMEM);
    for (unsigned long i = 0; i < n; i++) if (g[i] >= GFNS || d.host[g[i]] >= 0) return ERR(EINVAL);
    for (unsigned long i = 0; i < n; i++) { d.host[g[i]] = d.mfns++; d.host_access[g[i]] = 7; }
    return 0;
}
int xc_domain_decrease_reservation_exact(void *x, uint32_t dom, unsigned long n, unsigned order, unsigned long *g)
{
    (void)x; (void)dom; (void)order; ENTER();
    for (unsigned long i = 0; i < n; i++) {
        if (d.host[g[i]] < 0) return ERR(EINVAL);
        d.host[g[i]] = -1; d.was_there[g[i]] = true;
        /* p2m_altp2m_propagate_change: a frame in the range of what a view shows resets the view. */
        for (int k = 1; k < MAX_VIEWS; k++) if (d.view_used[k]) { d.views[k][g[i]].valid = 0; if ((long)g[i] >= d.low[k] && (long)g[i] <= d.high[k]) { memset(d.views[k], 0, sizeof d.views[k]); d.wiped++; } }
    }
    return 0;
}
int xc_domain_debug_control(void *x, uint32_t dom, uint32_t op, uint32_t v) { (void)x; (void)dom; ENTER(); d.vcpu[v].single_step = op; if (!op) d.vcpu[v].fast = 0; return 0; }

/* arch-x86/hvm/save.h: the offsets that are checked against it elsewhere. */
static void pack(int v, uint8_t *o) { struct regs *r = &d.vcpu[v].regs; uint64_t *g = (uint64_t *)(o + 512), order[] = {r->rax, r->rbx, r->rcx, r->rdx, r->rbp, r->rsi, r->rdi, r->rsp, r->r[0], r->r[1], r->r[2], r->r[3], r->r[4], r->r[5], r->r[6], r->r[7], r->rip, r->rflags, r->cr0, r->cr2, r->cr3, r->cr4}; memset(o, 0, 1032); memcpy(g, order, sizeof order); memcpy(o + 992, &r->efer, 8); memcpy(o + 944, &r->shadow_gs, 8); }
static void unpack(int v, const uint8_t *o) { struct regs *r = &d.vcpu[v].regs; const uint64_t *g = (const uint64_t *)(o + 512); r->rax = g[0]; r->rbx = g[1]; r->rcx = g[2]; r->rdx = g[3]; r->rbp = g[4]; r->rsi = g[5]; r->rdi = g[6]; r->rsp = g[7]; memcpy(r->r, g + 8, 64); r->rip = g[16]; r->rflags = g[17]; r->cr0 = g[18]; r->cr2 = g[19]; r->cr3 = g[20]; r->cr4 = g[21]; memcpy(&r->efer, o + 992, 8); memcpy(&r->shadow_gs, o + 944, 8); }
struct record { uint16_t type, instance; uint32_t len; };
int xc_domain_hvm_getcontext(void *x, uint32_t dom, uint8_t *out, uint32_t size)
{
    (void)x; (void)dom; ENTER();
    uint32_t need = 8 + 24 + VCPUS * (8 + 1032) + 8 + 16 + 8;
    if (!out) return need;
    if (size < need) return ERR(ENOSPC);
    uint8_t *o = out;
    *(struct record *)o = (struct record){1, 0, 24}; memset(o + 8, 0xaa, 24); o += 32;
    for (int v = 0; v < VCPUS; v++) { *(struct record *)o = (struct record){2, v, 1032}; pack(v, o + 8); o += 8 + 1032; }
    *(struct record *)o = (struct record){5, 0, 16}; memset(o + 8, 0xbb, 16); o += 24;
    *(struct record *)o = (struct record){0, 0, 0};
    return need;
}
int xc_domain_hvm_getcontext_partial(void *x, uint32_t dom, uint16_t type, uint16_t v, void *out, uint32_t size) { (void)x; (void)dom; ENTER(); if (v < VCPUS && d.vcpu[v].emulate) fake_run(v, 1); if (type != 2 || v >= VCPUS || size < 1032) return ERR(EINVAL); pack(v, out); return 0; }
int xc_domain_hvm_setcontext(void *x, uint32_t dom, uint8_t *in, uint32_t size)
{
    (void)x; (void)dom; ENTER();
    if (!d.pauses || size < 8 || ((struct record *)in)->type != 1) return ERR(EINVAL);
    for (int v = 0; v < VCPUS; v++) d.vcpu[v].down = 1;
    for (uint8_t *o = in;;) {
        struct record r = *(struct record *)o;
        if (!r.type) return 0;
        if (r.type == 2) { unpack(r.instance, o + 8); d.vcpu[r.instance].down = 0; } else if (r.type != 1) return ERR(EINVAL);
        o += 8 + r.len;
        if (o >= in + size) return ERR(ENODATA);
    }
}
int xc_hvm_param_get(void *x, uint32_t dom, uint32_t p, uint64_t *v) { (void)x; (void)dom; ENTER(); if (p != 35) return ERR(EINVAL); *v = knob("altp2m_param"); return 0; }
int xc_hvm_param_set(void *x, uint32_t dom, uint32_t p, uint64_t v) { (void)x; (void)dom; ENTER(); if (p != 35) return ERR(EINVAL); if (MINOR >= 19 || knob("altp2m_param")) return ERR(EEXIST); *fake_knob("altp2m_param") = v; return 0; }
static int no_listener(void) { return d.ring ? 0 : ERR(ENODEV); }
int xc_set_mem_access(void *x, uint32_t dom, int access, uint64_t g, uint32_t n)
{
    (void)x; (void)dom; ENTER(); if (no_listener()) return -1;
    if (g + n > GFNS || d.host[g] < 0) return ERR(ESRCH);
    /* Goes through to every view that has met the page, over what is there. */
    for (; n--; g++) { d.host_access[g] = access; for (int k = 1; k < MAX_VIEWS; k++) if (d.views[k][g].valid) d.views[k][g] = (struct entry){1, access, d.host[g]}; }
    return 0;
}
int xc_get_mem_access(void *x, uint32_t dom, uint64_t g, int *out) { (void)x; (void)dom; ENTER(); if (no_listener()) return -1; if (g >= GFNS || d.host[g] < 0) return ERR(ESRCH); *out = d.host_access[g]; return 0; }
static int altp2m_off(void) { if (knob("dying")) return ERR(EOPNOTSUPP); if (!knob("altp2m")) return ERR(EOPNOTSUPP); if (!knob("altp2m_param")) return ERR(EINVAL); return 0; }
static int no_view(uint16_t k) { if (altp2m_off()) return -1; if (!d.altp2m_on) return ERR(EOPNOTSUPP); return k >= MAX_VIEWS || !d.view_used[k] ? ERR(EINVAL) : 0; }
int xc_altp2m_get_domain_state(void *x, uint32_t dom, bool *on) { (void)x; (void)dom; ENTER(); if (altp2m_off()) return -1; *on = d.altp2m_on; return 0; }
int xc_altp2m_set_domain_state(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); if (altp2m_off()) return -1; d.altp2m_on = on; return 0; }
int xc_altp2m_create_view(void *x, uint32_t dom, int access, uint16_t *out)
{
    (void)x; (void)dom; ENTER(); if (no_view(0)) return -1;
    if (access < 0 || access > (MINOR >= 20 ? 11 : 10)) return ERR(EINVAL);
    for (int k = 1; k < MAX_VIEWS; k++) if (!d.view_used[k]) { d.view_used[k] = 1; memset(d.views[k], 0, sizeof d.views[k]); d.low[k] = GFNS; d.high[k] = -1; *out = k; return 0; }
    return ERR(EINVAL);
}
int xc_altp2m_destroy_view(void *x, uint32_t dom, uint16_t k) { (void)x; (void)dom; ENTER(); if (!k || no_view(k)) return -1; for (int v = 0; v < VCPUS; v++) if (d.vcpu[v].view == k) return ERR(EBUSY); d.view_used[k] = 0; return 0; }
int xc_altp2m_switch_to_view(void *x, uint32_t dom, uint16_t k) { (void)x; (void)dom; ENTER(); if (no_view(k)) return -1; for (int v = 0; v < VCPUS; v++) d.vcpu[v].view = k; return 0; }
static int set_access(uint16_t k, unsigned long g, int access)
{
    if (no_view(k) || no_listener()) return -1;
    if (access < 0 || access > 9) return ERR(EINVAL);
    struct entry *e = effective(k, g); if (!e) return ERR(ESRCH);
    d.views[k][g] = (struct entry){1, access, e->mfn};
    return 0;
}
int xc_altp2m_set_mem_access(void *x, uint32_t dom, uint16_t k, unsigned long g, int access) { (void)x; (void)dom; ENTER(); return set_access(k, g, access); }
int xc_altp2m_set_mem_access_multi(void *x, uint32_t dom, uint16_t k, uint8_t *access, uint64_t *g, uint32_t n) { (void)x; (void)dom; ENTER(); for (uint32_t i = 0; i < n; i++) if (set_access(k, g[i], access[i])) return -1; return 0; }
int xc_altp2m_get_mem_access(void *x, uint32_t dom, uint16_t k, unsigned long g, int *out) { (void)x; (void)dom; ENTER(); if (no_view(k)) return -1; if (g >= GFNS || !d.views[k][g].valid) return ERR(ESRCH); *out = d.views[k][g].access; return 0; }
int xc_altp2m_change_gfn(void *x, uint32_t dom, uint16_t k, unsigned long old, unsigned long new)
{
    (void)x; (void)dom; ENTER(); if (!k || no_view(k)) return -1;
    for (int v = 0; v < VCPUS; v++) if (d.vcpu[v].emulate & INSN_DATA && d.vcpu[v].view == k && (long)(d.vcpu[v].regs.rip >> 12) == (long)old) d.vcpu[v].misplaced++;
    if (new == ~0ul) { d.views[k][old].valid = 0; return 0; }
    struct entry *e = effective(k, new); if (!e || !effective(k, old)) return ERR(ESRCH);
    struct entry copy = *e;                                    /* with the rights that the frame has in the view */
    e = effective(k, new); copy.access = e->access;
    d.views[k][old] = copy;
    if ((long)new < d.low[k]) d.low[k] = new;
    if ((long)new > d.high[k]) d.high[k] = new;
    /* A moment in which a running guest could read what is not its own. */
    if (copy.access & R && copy.mfn != d.host[old] && !d.pauses) d.exposures++;
    return 0;
}
int xc_altp2m_get_vcpu_p2m_idx(void *x, uint32_t dom, uint32_t v, uint16_t *out) { (void)x; (void)dom; ENTER(); if (d.automatic) fake_run(v, 1); if (altp2m_off()) return -1; if (v >= (uint32_t)VCPUS) return ERR(EINVAL); *out = d.vcpu[v].view; return 0; }
void *xc_monitor_enable(void *x, uint32_t dom, uint32_t *port)
{
    (void)x; (void)dom; if (enter(__func__)) return 0;
    if (knob("busy") || d.ring) { errno = EBUSY; return 0; }
    d.ring = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); memset(d.ring, 0x5a, 64);
    d.req_prod = d.rsp_cons = 0; *port = 42; d.maps++;
    return d.ring;
}
int xc_monitor_disable(void *x, uint32_t dom) { (void)x; (void)dom; ENTER(); *fake_knob("busy") = 0; d.ring = 0; d.bp = d.step = d.cpuid = d.unimplemented = d.cr = d.descriptors = d.requests = d.ports = d.debug = 0; return 0; }
int xc_monitor_get_capabilities(void *x, uint32_t dom, uint32_t *out) { (void)x; (void)dom; ENTER(); *out = 0x1b7b | (knob("single_step") ? 4 : 0) | (knob("emul_monitor") ? 1 << 10 : 0); return 0; }
#define SWITCH(field) do { if (field == on) return ERR(EEXIST); field = on; return 0; } while (0)
int xc_monitor_singlestep(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); SWITCH(d.step); }
int xc_monitor_software_breakpoint(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); SWITCH(d.bp); }
int xc_monitor_debug_exceptions(void *x, uint32_t dom, bool on, bool sync) { (void)x; (void)dom; (void)sync; ENTER(); SWITCH(d.debug); }
int xc_monitor_cpuid(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); SWITCH(d.cpuid); }
#ifndef WITHOUT_xc_monitor_emul_unimplemented
int xc_monitor_emul_unimplemented(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); SWITCH(d.unimplemented); }
#endif
/* What the processor does for it ends when it is switched off, and not with the listener. */
int xc_monitor_descriptor_access(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); if (d.descriptors != on) d.exits = on; SWITCH(d.descriptors); }
int xc_monitor_guest_request(void *x, uint32_t dom, bool on, bool sync, bool user) { (void)x; (void)dom; (void)sync; (void)user; ENTER(); SWITCH(d.requests); }
#if MINOR >= 18
int xc_monitor_io(void *x, uint32_t dom, bool on) { (void)x; (void)dom; ENTER(); SWITCH(d.ports); }
#endif
int xc_monitor_write_ctrlreg(void *x, uint32_t dom, uint16_t i, bool on, bool sync, uint64_t mask, bool change) { (void)x; (void)dom; (void)i; (void)sync; (void)change; ENTER(); d.ignored = mask; SWITCH(d.cr); }
int xc_monitor_mov_to_msr(void *x, uint32_t dom, uint32_t msr, bool on, bool change) { (void)x; (void)dom; (void)msr; (void)on; (void)change; ENTER(); return 0; }
int xc_domctl(void *x, void *c) { (void)x; (void)c; ENTER(); return 0; }
#if MINOR >= 17
int xc_monitor_vmexit(void *x, uint32_t dom, bool on, bool sync) { (void)x; (void)dom; (void)on; (void)sync; ENTER(); return 0; }
#endif

/* --- the other libraries --- */
void *xenevtchn_open(void *l, unsigned f) { (void)l; (void)f; return enter(__func__) ? 0 : &d; }
int xenevtchn_close(void *x) { (void)x; return 0; }
int xenevtchn_fd(void *x)
{
    (void)x; if (count(__func__)) return -1;
    /* The tool is about to wait: now the guest runs. */
    for (int v = 0; v < VCPUS; v++) if (d.automatic) fake_run(v, d.automatic);
    return d.event_fd;
}
int xenevtchn_notify(void *x, uint32_t p) { (void)x; (void)p; ENTER(); resume(); return 0; }
int xenevtchn_bind_interdomain(void *x, uint32_t dom, uint32_t p) { (void)x; (void)dom; ENTER(); if (p != 42) return ERR(EINVAL); d.bound = 1; return 9; }
int xenevtchn_unbind(void *x, uint32_t p) { (void)x; (void)p; ENTER(); d.bound = 0; return 0; }
int xenevtchn_pending(void *x) { (void)x; ENTER(); uint64_t n; return read(d.event_fd, &n, 8) == 8 ? 9 : -1; }
int xenevtchn_unmask(void *x, uint32_t p) { (void)x; (void)p; ENTER(); return 0; }
void *xenforeignmemory_open(void *l, unsigned f) { (void)l; (void)f; return enter(__func__) ? 0 : &d; }
int xenforeignmemory_close(void *x) { (void)x; return 0; }
void *xenforeignmemory_map(void *x, uint32_t dom, int prot, size_t n, const unsigned long *g, int *err)
{
    (void)x; (void)dom; if (enter(__func__)) return 0;
    uint8_t *at = mmap(0, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        err[i] = g[i] < GFNS && d.host[g[i]] >= 0 && !knob("dying") ? 0 : -EINVAL;
        if (err[i]) bad++; else mmap(at + i * PAGE, PAGE, prot, MAP_SHARED | MAP_FIXED, d.memfd, d.host[g[i]] * PAGE);
    }
    if (bad == (int)n) { munmap(at, n * PAGE); errno = EINVAL; return 0; }
    d.maps++;
    return at;
}
int xenforeignmemory_unmap(void *x, void *at, size_t n) { (void)x; ENTER(); d.maps--; return munmap(at, n * PAGE); }
void *xendevicemodel_open(void *l, unsigned f) { (void)l; (void)f; return enter(__func__) ? 0 : &d; }
int xendevicemodel_close(void *x) { (void)x; return 0; }
int xendevicemodel_inject_event(void *x, uint16_t dom, int v, uint8_t vector, uint8_t type, uint32_t e, uint8_t len, uint64_t cr2)
{
    (void)x; (void)dom; (void)e; (void)cr2; ENTER();
    if (vector == 3) { if (type != 6) return ERR(EINVAL); d.vcpu[v].int3s++; d.vcpu[v].regs.rip += len; } else d.vcpu[v].injected++;
    return 0;
}
void *xs_open(unsigned long f) { (void)f; return enter(__func__) ? 0 : &d; }
void xs_close(void *x) { (void)x; }
void *xs_read(void *x, uint32_t t, const char *path, unsigned *len)
{
    (void)x; (void)t; if (count(__func__)) return 0;
    const char *name = !strcmp(path, "/local/domain/0/name") ? "Domain-0" : !strcmp(path, "/local/domain/7/name") && knob("named") ? "guest" : 0;
    if (!name) { errno = ENOENT; return 0; }
    *len = strlen(name); return strdup(name);
}
