/* A file system in memory: a flat list of paths. */
#include "kernel.h"

#define MAX_FILES 32
#define PATH_SIZE 64
#define CONTENT_SIZE PAGE

struct file {
	char path[PATH_SIZE];
	const char *content;
	u64 size;
	u64 flags;
};

#define FILE_WRITABLE 1 /* content is a frame of its own */
#define FILE_SECRET 2 /* nobody here may open it */

#define FIXED(path, text, flags) {path, text, sizeof(text) - 1, flags}

static struct file files[MAX_FILES] = {
	FIXED("/bin/shell", "#!native shell\n", 0),
	FIXED("/bin/updater", "#!native updater\n", 0),
	FIXED("/opt/app/app", "#!native app\n", 0),
	FIXED("/opt/app/app.conf", "theme=dark\nlicence=AAAA-BBBB-CCCC\n", 0),
	FIXED("/opt/app/data.db", "db1:alice,42;bob,17;carol,99", 0),
	FIXED("/etc/hostname", "demo\n", 0),
	FIXED("/etc/motd", "Welcome to the demo guest.\n", 0),
	FIXED("/etc/passwd", "root:x:0:0::/root:/bin/shell\nalice:x:1000:1000::/home/alice:/bin/shell\n", 0),
	FIXED("/etc/shadow", "root:$6$demo$unreadable\n", FILE_SECRET),
	FIXED("/etc/update.conf", "server=198.51.100.7\nchannel=stable\n", 0),
	FIXED("/home/alice/notes.txt", "buy milk; call Bob; finish the thesis\n", 0),
	FIXED("/home/alice/.ssh/id_ed25519", "-----BEGIN DEMO KEY-----\nbm90IGEga2V5\n-----END DEMO KEY-----\n", 0),
};
static spinlock file_lock;
/* Descriptors of code that runs before there are tasks. */
static struct open_file boot_fds[MAX_FDS];

static struct open_file *descriptors(void)
{
	struct task *task = this_cpu()->current;
	return task == &this_cpu()->idle ? boot_fds : task->fds;
}

static struct open_file *descriptor(int fd)
{
	if (fd < 3 || fd >= MAX_FDS || !descriptors()[fd].file)
		return 0;
	return &descriptors()[fd];
}

static struct file *find(const char *path)
{
	for (int i = 0; i < MAX_FILES; i++)
		if (files[i].path[0] && string_equal(files[i].path, path))
			return &files[i];
	return 0;
}

static struct file *create(const char *path)
{
	if (string_length(path) >= PATH_SIZE)
		return 0;
	u64 flags = lock(&file_lock);
	struct file *file = 0;
	for (int i = 0; i < MAX_FILES && !file; i++)
		if (!files[i].path[0]) {
			file = &files[i];
			file->content = physical(frame_allocate());
			file->flags = FILE_WRITABLE;
			memcpy(file->path, path, string_length(path) + 1);
		}
	unlock(&file_lock, flags);
	return file;
}

const char *file_text(const char *path, u64 *size)
{
	struct file *file = find(path);
	if (!file)
		return 0;
	*size = file->size;
	return file->content;
}

/* Opens the file at `path`; gives a descriptor, or 0 under OPEN_CHECK. */
TRACEABLE int open_file(const char *path, u64 flags)
{
	count(&truth.calls[CALLS_OPEN_FILE], 1);
	struct file *file = find(path);
	if (!file && flags & OPEN_CREATE)
		file = create(path);
	if (!file)
		return -ENOENT;
	if (file->flags & FILE_SECRET || (flags & OPEN_WRITE && !(file->flags & FILE_WRITABLE)))
		return -EACCES;
	if (flags & OPEN_CHECK)
		return 0;
	struct open_file *fds = descriptors();
	for (int fd = 3; fd < MAX_FDS; fd++)
		if (!fds[fd].file) {
			fds[fd].position = flags & OPEN_WRITE ? file->size : 0;
			fds[fd].flags = flags;
			fds[fd].file = file;
			return fd;
		}
	return -EMFILE;
}

/* Reads at most `n` bytes from where the descriptor stands. */
TRACEABLE long read_file(int fd, void *buffer, u64 n)
{
	count(&truth.calls[CALLS_READ_FILE], 1);
	struct open_file *open = descriptor(fd);
	if (!open)
		return -EBADF;
	u64 left = open->file->size - open->position;
	if (n > left)
		n = left;
	memcpy(buffer, open->file->content + open->position, n);
	open->position += n;
	return n;
}

/* Writes at the end of a file; a full file starts again at its beginning, as a log that rotates. 1 is the console. */
TRACEABLE long write_file(int fd, const void *buffer, u64 n)
{
	count(&truth.calls[CALLS_WRITE_FILE], 1);
	if (fd == 1) {
		console_write(buffer, n);
		return n;
	}
	struct open_file *open = descriptor(fd);
	if (!open || !(open->flags & OPEN_WRITE))
		return -EBADF;
	if (n > CONTENT_SIZE)
		return -ENOSPC;
	u64 flags = lock(&file_lock);
	struct file *file = open->file;
	if (file->size + n > CONTENT_SIZE)
		file->size = 0;
	memcpy((char *)file->content + file->size, buffer, n);
	file->size += n;
	open->position = file->size;
	unlock(&file_lock, flags);
	return n;
}

TRACEABLE int close_file(int fd)
{
	count(&truth.calls[CALLS_CLOSE_FILE], 1);
	struct open_file *open = descriptor(fd);
	if (!open)
		return -EBADF;
	open->file = 0;
	return 0;
}
