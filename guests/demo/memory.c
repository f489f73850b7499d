/* Frames and page tables. */
#include "kernel.h"

u64 kernel_root;
/* Where physical memory is seen: the boot tables' kernel window first, PHYSMAP as soon as it exists. */
static u64 window = KBASE;
static u64 next_frame, frames_end;
static spinlock frame_lock;

void *physical(u64 pa)
{
	return (void *)(window + pa);
}

/* Gives a frame of zeros. They are never given back: tasks are few and live long. */
u64 frame_allocate(void)
{
	u64 flags = lock(&frame_lock);
	u64 frame = next_frame;
	next_frame += PAGE;
	unlock(&frame_lock, flags);
	if (frame >= frames_end)
		panic("out of memory, frame and end", frame, frames_end);
	memset(physical(frame), 0, PAGE);
	return frame;
}

/* The entry for `va` at `level` (0: 4 KiB page, 1: 2 MiB page), making the tables above it. */
static u64 *entry(u64 root, u64 va, int level)
{
	u64 table = root;
	for (int l = 3; l > level; l--) {
		u64 *e = (u64 *)physical(table) + (va >> (12 + 9 * l) & 511);
		if (!(*e & PTE_PRESENT))
			*e = frame_allocate() | PTE_PRESENT | PTE_WRITE | PTE_USER;
		table = *e & 0xffffffffff000;
	}
	return (u64 *)physical(table) + (va >> (12 + 9 * level) & 511);
}

void map_page(u64 root, u64 va, u64 pa, u64 flags)
{
	*entry(root, va, 0) = pa | flags | PTE_PRESENT;
	__asm__ volatile("invlpg (%0)" ::"r"(va) : "memory");
}

static void map_image(char *from, char *to, u64 flags)
{
	for (u64 va = (u64)from; va < (u64)to; va += PAGE)
		map_page(kernel_root, va, va - KBASE, flags);
}

/* Text is executable and not writable, read-only data neither, the rest is not executable; PHYSMAP shows all of it writable. */
void memory_init(u64 memory_size)
{
	next_frame = (u64)image_end - KBASE;
	frames_end = memory_size & -PAGE;
	kernel_root = frame_allocate();
	map_image(text_start, text_end, 0);
	map_image(rodata_start, data_start, PTE_NX);
	map_image(data_start, image_end, PTE_WRITE | PTE_NX);
	for (u64 pa = 0; pa < memory_size; pa += 0x200000)
		*entry(kernel_root, PHYSMAP + pa, 1) = pa | 0x80 | PTE_WRITE | PTE_NX | PTE_PRESENT;
	__asm__ volatile("mov %0, %%cr3" ::"r"(kernel_root) : "memory");
	window = PHYSMAP;
}

/* A root for a task: nothing of its own yet, and the kernel's half. */
u64 user_root(void)
{
	u64 root = frame_allocate();
	memcpy((char *)physical(root) + PAGE / 2, (char *)physical(kernel_root) + PAGE / 2, PAGE / 2);
	return root;
}
