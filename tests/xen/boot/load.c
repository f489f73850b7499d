/*
 * Reads what sector 0 of the first disk lists (lab/bootdisk.py writes it) to the addresses it names: ATA PIO, READ MULTIPLE EXT,
 * 16 sectors a block (ATA/ATAPI-7, 6.32). Runs once, in 32-bit protected mode without paging.
 */
typedef unsigned char u8;
typedef unsigned int u32;

#define DATA 0x1f0
#define COUNT 0x1f2
#define LBA_LOW 0x1f3
#define LBA_MID 0x1f4
#define LBA_HIGH 0x1f5
#define DEVICE 0x1f6
#define COMMAND 0x1f7
#define CONTROL 0x3f6
#define BUSY 0x80
#define DATA_REQUEST 0x08
#define SECTOR 512
#define BLOCK 16

struct part {
	u32 address, lba, sectors, reserved;
};

struct contents {
	u32 magic, parts, entry, information;
	struct part part[31];
};

static inline void outb(u8 value, unsigned short port)
{
	__asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline u8 inb(unsigned short port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void wait_idle(void)
{
	while (inb(COMMAND) & BUSY)
		;
}

static void read_sectors(u32 lba, u32 n, void *to)
{
	wait_idle();
	outb(0x40, DEVICE);
	outb(n >> 8, COUNT);
	outb(lba >> 24, LBA_LOW);
	outb(0, LBA_MID);
	outb(0, LBA_HIGH);
	outb(n, COUNT);
	outb(lba, LBA_LOW);
	outb(lba >> 8, LBA_MID);
	outb(lba >> 16, LBA_HIGH);
	outb(0x29, COMMAND);
	while (n) {
		u32 block = n > BLOCK ? BLOCK : n, words = block * (SECTOR / 2);
		u8 status;
		do
			status = inb(COMMAND);
		while ((status & BUSY) || !(status & DATA_REQUEST));
		__asm__ volatile("rep insw" : "+D"(to), "+c"(words) : "d"(DATA) : "memory");
		n -= block;
	}
}

/* Low half: the entry point; high half: the address of the multiboot information. */
unsigned long long load(void)
{
	struct contents *disk = (struct contents *)0x70000;

	outb(2, CONTROL); /* no interrupts */
	wait_idle();
	outb(0x40, DEVICE);
	outb(BLOCK, COUNT);
	outb(0xc6, COMMAND); /* SET MULTIPLE MODE */
	read_sectors(0, 1, disk);
	for (u32 i = 0; i < disk->parts; i++) {
		u32 lba = disk->part[i].lba, left = disk->part[i].sectors, to = disk->part[i].address;
		while (left) {
			u32 n = left > 0x8000 ? 0x8000 : left;
			read_sectors(lba, n, (void *)to);
			lba += n;
			left -= n;
			to += n * SECTOR;
		}
	}
	return (unsigned long long)disk->information << 32 | disk->entry;
}
