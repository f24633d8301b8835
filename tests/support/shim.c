// Answers system calls as some file systems and sandboxes do. The variable SHIM names them: "flock=38 fsync-directory=22", where
// the numbers are those of errno.h. shim_hits counts such answers, shim_emulated the files that posix_fallocate wrote to.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define REAL(result, name, ...) ((result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

int shim_hits = 0, shim_emulated = 0;

// The error to answer with; 0 if the call is made.
static int on(const char *call) {
    const char *found = getenv("SHIM");
    size_t length = strlen(call);
    for (; found && *found; found += strcspn(found, " "), found += strspn(found, " "))
        if (!strncmp(found, call, length) && found[length] == '=') {
            shim_hits++;
            return atoi(found + length + 1);
        }
    return 0;
}

static int fails(const char *call) {
    int code = on(call);
    if (code) errno = code;
    return code;
}

static int is_directory(int fd) {
    struct stat s;
    return !REAL(int, fstat, int, struct stat *)(fd, &s) && S_ISDIR(s.st_mode);
}

int flock(int fd, int kind) { return fails("flock") ? -1 : REAL(int, flock, int, int)(fd, kind); }

int fsync(int fd) { return fails(is_directory(fd) ? "fsync-directory" : "fsync") ? -1 : REAL(int, fsync, int)(fd); }

int fdatasync(int fd) { return fails("fdatasync") ? -1 : REAL(int, fdatasync, int)(fd); }

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    if (flags && fails("renameat2")) return -1;
    return REAL(int, renameat2, int, const char *, int, const char *, unsigned)(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
    return fails("link") ? -1 : REAL(int, link, const char *, const char *)(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return fails("link") ? -1 : REAL(int, linkat, int, const char *, int, const char *, int)(a, from, b, to, flags);
}

static int lock_or_control(int fd, int command, void *argument) {
    if (command == F_OFD_SETLK && fails("ofd")) return -1;
    return REAL(int, fcntl, int, int, void *)(fd, command, argument);
}

#define FCNTL(name)                                    \
    int name(int fd, int command, ...) {               \
        va_list more;                                  \
        va_start(more, command);                       \
        void *argument = va_arg(more, void *);         \
        va_end(more);                                  \
        return lock_or_control(fd, command, argument); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

static ssize_t read2(int fd, const struct iovec *to, int count, off_t at, int flags) {
    if (flags && fails("preadv2")) return -1;
    return REAL(ssize_t, preadv2, int, const struct iovec *, int, off_t, int)(fd, to, count, at, flags);
}
ssize_t preadv2(int fd, const struct iovec *to, int count, off_t at, int flags) { return read2(fd, to, count, at, flags); }
ssize_t preadv64v2(int fd, const struct iovec *to, int count, off_t at, int flags) { return read2(fd, to, count, at, flags); }

// What is to be read or written at once, where all calls do a part of it.
static size_t part(size_t size) { return size > 1 && on("short") ? size / 2 : size; }

ssize_t pread(int fd, void *to, size_t size, off_t at) {
    return fails("pread") ? -1 : REAL(ssize_t, pread, int, void *, size_t, off_t)(fd, to, part(size), at);
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t at) {
    if (on("full")) return 0;
    return fails("pwrite") ? -1 : REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, from, part(size), at);
}

int fallocate(int fd, int mode, off_t at, off_t size) {
    return fails("fallocate") ? -1 : REAL(int, fallocate, int, int, off_t, off_t)(fd, mode, at, size);
}

// glibc's, where fallocate is not supported.
static int emulated(int fd, off_t at, off_t size) {
    if (!on("fallocate")) return REAL(int, posix_fallocate, int, off_t, off_t)(fd, at, size);
    shim_emulated++;
    for (off_t end = at + size; at < end; at += 4096)
        if (pwrite(fd, "", 1, at) != 1) return errno;
    return 0;
}
int posix_fallocate(int fd, off_t at, off_t size) { return emulated(fd, at, size); }
int posix_fallocate64(int fd, off_t at, off_t size) { return emulated(fd, at, size); }

static int cut(int fd, off_t size) { return fails("ftruncate") ? -1 : REAL(int, ftruncate, int, off_t)(fd, size); }
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off_t size) { return cut(fd, size); }

ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t size, unsigned flags) {
    if (fails("copy_file_range")) return -1;
    return REAL(ssize_t, copy_file_range, int, off_t *, int, off_t *, size_t, unsigned)(from, a, to, b, size, flags);
}

int sync_file_range(int fd, off_t at, off_t size, unsigned flags) {
    if (fails("sync_file_range")) return -1;
    return REAL(int, sync_file_range, int, off_t, off_t, unsigned)(fd, at, size, flags);
}

static int advise(int fd, off_t at, off_t size, int advice) {
    int code = on("fadvise");
    return code ? code : REAL(int, posix_fadvise, int, off_t, off_t, int)(fd, at, size, advice);
}
int posix_fadvise(int fd, off_t at, off_t size, int advice) { return advise(fd, at, size, advice); }
int posix_fadvise64(int fd, off_t at, off_t size, int advice) { return advise(fd, at, size, advice); }

int statfs(const char *path, struct statfs *found) {
    return fails("statfs") ? -1 : REAL(int, statfs, const char *, struct statfs *)(path, found);
}

static int space(const char *path, struct statvfs *found) {
    return fails("statvfs") ? -1 : REAL(int, statvfs, const char *, struct statvfs *)(path, found);
}
int statvfs(const char *path, struct statvfs *found) { return space(path, found); }
int statvfs64(const char *path, struct statvfs64 *found) { return space(path, (struct statvfs *)found); }

// As FUSE without stable numbers: an open file's is another each time.
static int numbered(int fd, struct stat *found) {
    int failed = REAL(int, fstat, int, struct stat *)(fd, found);
    if (!failed && on("inode")) found->st_ino += 1000000 + shim_hits;
    return failed;
}
int fstat(int fd, struct stat *found) { return numbered(fd, found); }
int fstat64(int fd, struct stat64 *found) { return numbered(fd, (struct stat *)found); }
