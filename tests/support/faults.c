// Stops a process, fails, or raises a signal at the n-th call that changes the file system below a folder; or pauses before each of
// them, and before each that opens a file or reads a folder there; or records those that change it.
// What was counted is in memory that forked processes share. The program that is tested by it sets everything by the fault_ functions.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define REAL(result, name, ...) ((result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define EXCHANGE 2 /* RENAME_EXCHANGE */
#define BTRFS 0x9123683E

enum { NONE, KILL_BEFORE, KILL_AFTER, KILL_GROUP, FAIL, SIGNAL, PAUSE };

static struct {
    int count;       // calls of the processes that are armed
    char call[256];  // the one that was hit
} *shared;
static char watched[PATH_MAX];
static int armed, action, at, value, without_exchange, log_to = -1;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_watch(const char *folder) { snprintf(watched, sizeof watched, "%s", folder); }

// Counts the calls of this process from now on, and does something at one of them.
void fault_arm(int what, int call, int with) {
    armed = 1, action = what, at = call, value = with;
    shared->count = 0, shared->call[0] = 0;
}
void fault_disarm(void) { armed = 0; }
void fault_record(int fd) { log_to = fd; }
void fault_without_exchange(int yes) { without_exchange = yes; }
int fault_count(void) { return shared->count; }
const char *fault_call(void) { return shared->call; }

typedef struct {
    int counts, hit;
    char path[2 * PATH_MAX];
} Call;

static void path_of(int fd, char *to) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, to, PATH_MAX - 1);
    to[size > 0 ? size : 0] = 0;
}

static void resolve(int directory, const char *path, char *to) {
    to[0] = 0;
    if (path[0] != '/') {
        if (directory == AT_FDCWD) {
            if (!getcwd(to, PATH_MAX)) to[0] = 0;
        } else {
            path_of(directory, to);
        }
        strcat(to, "/");
    }
    strncat(to, path, PATH_MAX);
}

static int is_watched(const char *path) {
    size_t size = strlen(watched);
    return size && !strncmp(path, watched, size) && (path[size] == '/' || !path[size]);
}

// Returns whether the call is to be made.
static int enter(Call *call, const char *name) {
    call->counts = armed && is_watched(call->path);
    call->hit = 0;
    if (!call->counts) return 1;
    if (log_to >= 0) pthread_mutex_lock(&recording);
    int number = __atomic_add_fetch(&shared->count, 1, __ATOMIC_SEQ_CST);
    if (action == PAUSE) {  // value: a socket, whose other end answers
        snprintf(shared->call, sizeof shared->call, "%s %.200s", name, call->path + strlen(watched));
        char byte = 0;
        if (syscall(SYS_write, value, &byte, 1) != 1 || syscall(SYS_read, value, &byte, 1) != 1) abort();
        call->hit = 0;
        return 1;
    }
    call->hit = number == at;
    if (!call->hit) return 1;
    snprintf(shared->call, sizeof shared->call, "%s %.200s", name, call->path + strlen(watched));
    if (action == KILL_BEFORE) syscall(SYS_exit_group, 77);
    if (action == KILL_GROUP) kill(0, SIGKILL);
    if (action != FAIL) return 1;
    errno = value;
    if (log_to >= 0) pthread_mutex_unlock(&recording);
    return 0;
}

static void leave(Call *call) {
    int code = errno;
    if (call->counts && log_to >= 0) pthread_mutex_unlock(&recording);
    if (call->hit && action == KILL_AFTER) syscall(SYS_exit_group, 77);
    if (call->hit && action == SIGNAL) kill(getpid(), value);
    errno = code;
}

static Call on_path(int directory, const char *path) {
    Call call;
    resolve(directory, path, call.path);
    return call;
}

static Call on_fd(int fd) {
    Call call;
    path_of(fd, call.path);
    return call;
}

static int is_recorded(const Call *call, int failed) { return call->counts && log_to >= 0 && !failed; }

// A line of words, of which the last is the size of the bytes that follow it.
static void record(const void *data, size_t size, const char *format, ...) {
    char line[2 * PATH_MAX];
    va_list more;
    va_start(more, format);
    int length = vsnprintf(line, sizeof line, format, more);
    va_end(more);
    length += sprintf(line + length, "\t%zu\n", size);
    if (syscall(SYS_write, log_to, line, length) != length) abort();
    if (size && syscall(SYS_write, log_to, data, size) != (ssize_t)size) abort();
}

static unsigned long inode(const char *path) {
    struct stat found;
    return lstat(path, &found) ? 0 : found.st_ino;
}

static unsigned long inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

static const char *name_of(const char *path) { return strrchr(path, '/') + 1; }

static unsigned long parent(const char *path) {
    char folder[2 * PATH_MAX];
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(path, '/') - path), path);
    struct stat found;
    return stat(folder, &found) ? 0 : found.st_ino;
}

static void record_new(const char *what, const char *path) {
    struct stat found;
    if (lstat(path, &found)) abort();
    record(NULL, 0, "%s\t%lu\t%s\t%lu\t%o", what, parent(path), name_of(path), found.st_ino, found.st_mode & 07777);
}

static void record_size(int fd) {
    struct stat found;
    fstat(fd, &found);
    record(NULL, 0, "size\t%lu\t%lld", found.st_ino, (long long)found.st_size);
}

static int open_any(int directory, const char *path, int flags, mode_t mode) {
    int (*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat");
    if (!(flags & (O_CREAT | O_TRUNC)) && action != PAUSE) return real(directory, path, flags, mode);
    Call call = on_path(directory, path);
    if (!enter(&call, flags & O_CREAT ? "open-create" : flags & O_TRUNC ? "open-truncate" : "open")) return -1;
    unsigned long before = inode(call.path);
    int fd = real(directory, path, flags, mode);
    if (is_recorded(&call, fd < 0)) {
        if (!before)
            record_new("create", call.path);
        else if (flags & O_TRUNC)
            record_size(fd);
    }
    leave(&call);
    return fd;
}

#define MODE(last)         \
    mode_t mode = 0;       \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list more;      \
        va_start(more, last); \
        mode = va_arg(more, mode_t); \
        va_end(more);      \
    }
int open(const char *path, int flags, ...) {
    MODE(flags)
    return open_any(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return open_any(AT_FDCWD, path, flags, mode);
}
int openat(int directory, const char *path, int flags, ...) {
    MODE(flags)
    return open_any(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    MODE(flags)
    return open_any(directory, path, flags, mode);
}

static int make_directory(int directory, const char *path, mode_t mode) {
    Call call = on_path(directory, path);
    if (!enter(&call, "mkdir")) return -1;
    int failed = REAL(int, mkdirat, int, const char *, mode_t)(directory, path, mode);
    if (is_recorded(&call, failed)) record_new("mkdir", call.path);
    leave(&call);
    return failed;
}
int mkdir(const char *path, mode_t mode) { return make_directory(AT_FDCWD, path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return make_directory(directory, path, mode); }

static int rename_any(int a, const char *from, int b, const char *to, unsigned flags) {
    Call call = on_path(b, to);
    char source[2 * PATH_MAX];
    resolve(a, from, source);
    if (!enter(&call, flags & EXCHANGE ? "exchange" : "rename")) return -1;
    int failed = -1;
    if (without_exchange && flags & EXCHANGE)
        errno = EINVAL;
    else
        failed = REAL(int, renameat2, int, const char *, int, const char *, unsigned)(a, from, b, to, flags);
    if (is_recorded(&call, failed))
        record(NULL, 0, "%s\t%lu\t%s\t%lu\t%s", flags & EXCHANGE ? "exchange" : "rename", parent(source), name_of(source),
               parent(call.path), name_of(call.path));
    leave(&call);
    return failed;
}
int rename(const char *from, const char *to) { return rename_any(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return rename_any(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return rename_any(a, from, b, to, flags);
}

static int link_any(int a, const char *from, int b, const char *to, int flags) {
    Call call = on_path(b, to);
    if (!enter(&call, "link")) return -1;
    int failed = REAL(int, linkat, int, const char *, int, const char *, int)(a, from, b, to, flags);
    if (is_recorded(&call, failed))
        record(NULL, 0, "link\t%lu\t%s\t%lu", parent(call.path), name_of(call.path), inode(call.path));
    leave(&call);
    return failed;
}
int link(const char *from, const char *to) { return link_any(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char *from, int b, const char *to, int flags) { return link_any(a, from, b, to, flags); }

static int remove_any(int directory, const char *path, int flags) {
    Call call = on_path(directory, path);
    if (!enter(&call, flags & AT_REMOVEDIR ? "rmdir" : "unlink")) return -1;
    int failed = REAL(int, unlinkat, int, const char *, int)(directory, path, flags);
    if (is_recorded(&call, failed))
        record(NULL, 0, "unlink\t%lu\t%s", parent(call.path), name_of(call.path));
    leave(&call);
    return failed;
}
int unlink(const char *path) { return remove_any(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return remove_any(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int directory, const char *path, int flags) { return remove_any(directory, path, flags); }

static ssize_t write_any(int fd, const void *data, size_t size, off_t offset) {
    Call call = on_fd(fd);
    if (!enter(&call, "write")) return -1;
    off_t begin = offset < 0 && call.counts ? lseek(fd, 0, SEEK_CUR) : offset;
    ssize_t done = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    if (is_recorded(&call, done < 0))
        record(data, done, "write\t%lu\t%lld", inode_of(fd), (long long)begin);
    leave(&call);
    return done;
}
ssize_t write(int fd, const void *data, size_t size) { return write_any(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_any(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return write_any(fd, data, size, offset); }

ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t size, unsigned flags) {
    Call call = on_fd(to);
    if (!enter(&call, "copy_file_range")) return -1;
    off_t begin = b ? *b : call.counts ? lseek(to, 0, SEEK_CUR) : 0;
    ssize_t done =
        REAL(ssize_t, copy_file_range, int, off_t *, int, off_t *, size_t, unsigned)(from, a, to, b, size, flags);
    if (is_recorded(&call, done < 0)) {
        void *data = malloc(done + 1);
        off_t source = a ? *a - done : lseek(from, 0, SEEK_CUR) - done;  // the copy may not be open for reading
        if (pread(from, data, done, source) != done) abort();
        record(data, done, "write\t%lu\t%lld", inode_of(to), (long long)begin);
        free(data);
    }
    leave(&call);
    return done;
}

static int cut(int fd, off_t size) {
    Call call = on_fd(fd);
    if (!enter(&call, "ftruncate")) return -1;
    int failed = syscall(SYS_ftruncate, fd, size);
    if (is_recorded(&call, failed)) record_size(fd);
    leave(&call);
    return failed;
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off_t size) { return cut(fd, size); }

static int allocate(int fd, int mode, off_t offset, off_t size) {
    Call call = on_fd(fd);
    if (!enter(&call, "fallocate")) return -1;
    int failed = syscall(SYS_fallocate, fd, mode, offset, size);
    if (is_recorded(&call, failed)) record_size(fd);
    leave(&call);
    return failed;
}
int fallocate(int fd, int mode, off_t offset, off_t size) { return allocate(fd, mode, offset, size); }
int fallocate64(int fd, int mode, off_t offset, off_t size) { return allocate(fd, mode, offset, size); }
int posix_fallocate(int fd, off_t offset, off_t size) { return allocate(fd, 0, offset, size) ? errno : 0; }
int posix_fallocate64(int fd, off_t offset, off_t size) { return allocate(fd, 0, offset, size) ? errno : 0; }

static int sync_any(int fd, const char *name, long number) {
    Call call = on_fd(fd);
    if (!enter(&call, name)) return -1;
    int failed = syscall(number, fd);
    if (is_recorded(&call, failed)) record(NULL, 0, "sync\t%lu", inode_of(fd));
    leave(&call);
    return failed;
}
int fsync(int fd) { return sync_any(fd, "fsync", SYS_fsync); }
int fdatasync(int fd) { return sync_any(fd, "fdatasync", SYS_fdatasync); }

static int change_mode(Call call, int failed, mode_t mode) {
    if (is_recorded(&call, failed)) record(NULL, 0, "mode\t%lu\t%o", inode(call.path), mode);
    leave(&call);
    return failed;
}
int fchmod(int fd, mode_t mode) {
    Call call = on_fd(fd);
    return enter(&call, "fchmod") ? change_mode(call, syscall(SYS_fchmod, fd, mode), mode) : -1;
}
int fchmodat(int directory, const char *path, mode_t mode, int flags) {
    Call call = on_path(directory, path);
    if (!enter(&call, "chmod")) return -1;
    int failed = REAL(int, fchmodat, int, const char *, mode_t, int)(directory, path, mode, flags);
    return change_mode(call, failed, mode);
}
int chmod(const char *path, mode_t mode) {
    Call call = on_path(AT_FDCWD, path);
    return enter(&call, "chmod") ? change_mode(call, syscall(SYS_chmod, path, mode), mode) : -1;
}

// As on Btrfs: files are reserved, and what no model changed is cloned, wherever the test runs.
int statfs(const char *path, struct statfs *found) {
    int failed = REAL(int, statfs, const char *, struct statfs *)(path, found);
    if (!failed && armed) found->f_type = BTRFS;
    return failed;
}
int fstatfs(int fd, struct statfs *found) {
    int failed = REAL(int, fstatfs, int, struct statfs *)(fd, found);
    if (!failed && armed) found->f_type = BTRFS;
    return failed;
}
