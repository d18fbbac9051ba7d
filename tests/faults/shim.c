/* Preloaded into the trainers: answers their file operations with an error, slowly, or with SIGKILL, as a page of memory
 * that the suite shares with them says (`Page` in layer.py). It also tells them another time of day.
 *
 * Operations: o open for writing, w write, s fsync, m mkdir, r rename, u unlink and rmdir, p pread. A process that is
 * killed in a write has written the first half.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TRACE 4096
#define KILL (-1)
#define SLOW (-2)

struct page {
    int32_t spared, action, delay_ms, armed;
    int64_t skip, count, seen, struck, clock_s;
    char ops[16], under[512], trace[TRACE];
};

static struct page *page;

__attribute__((constructor)) static void open_page(void)
{
    const char *name = getenv("FAULT_PAGE");
    int fd = name ? syscall(SYS_openat, AT_FDCWD, name, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *found = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    page = found == MAP_FAILED ? NULL : found;
    close(fd);
}

/* What this operation gets: 0, an errno, or KILL. */
static int verdict(char op, int folder, const char *name)
{
    char path[2 * PATH_MAX] = "", link[64];
    if (!page || !page->under[0] || !strchr(page->ops, op) || getpid() == page->spared)
        return 0;
    if (folder >= 0 && name[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t end = readlink(link, path, PATH_MAX);
        if (end < 0)
            return 0;
        path[end] = 0;
        if (name[0])
            strcat(path, "/");
    }
    strncat(path, name, PATH_MAX - 2);
    size_t length = strlen(page->under);
    if (strncmp(path, page->under, length) || (path[length] && path[length] != '/'))
        return 0;
    int64_t at = __sync_fetch_and_add(&page->seen, 1);
    if (at < TRACE)
        page->trace[at] = op;
    if (!page->armed || at < page->skip || at >= page->skip + page->count)
        return 0;
    __sync_fetch_and_add(&page->struck, 1);
    if (page->action == SLOW)
        usleep(1000 * page->delay_ms);
    return page->action == SLOW ? 0 : page->action;
}

static int fails(char op, int folder, const char *name)
{
    int what = verdict(op, folder, name);
    if (what == KILL)
        kill(getpid(), SIGKILL);
    if (what > 0)
        errno = what;
    return what != 0;
}

static int opened(int folder, const char *name, int flags, mode_t mode)
{
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails('o', folder, name))
        return -1;
    return syscall(SYS_openat, folder, name, flags, mode);
}

#define OPEN(symbol)                                                                                                  \
    int symbol(const char *name, int flags, ...)                                                                      \
    {                                                                                                                 \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = va_arg(rest, int);                                                                              \
        va_end(rest);                                                                                                 \
        return opened(AT_FDCWD, name, flags, mode);                                                                   \
    }
#define OPENAT(symbol)                                                                                                \
    int symbol(int folder, const char *name, int flags, ...)                                                          \
    {                                                                                                                 \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = va_arg(rest, int);                                                                              \
        va_end(rest);                                                                                                 \
        return opened(folder, name, flags, mode);                                                                     \
    }
#define PREAD(symbol)                                                                                                 \
    ssize_t symbol(int fd, void *data, size_t size, off_t offset)                                                     \
    {                                                                                                                 \
        return fails('p', fd, "") ? -1 : syscall(SYS_pread64, fd, data, size, offset);                                \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PREAD(pread)
PREAD(pread64)

ssize_t write(int fd, const void *data, size_t size)
{
    int what = verdict('w', fd, "");
    if (what == KILL) {
        (void)!syscall(SYS_write, fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    if (what > 0)
        errno = what;
    return what ? -1 : syscall(SYS_write, fd, data, size);
}

int fsync(int fd)
{
    return fails('s', fd, "") ? -1 : syscall(SYS_fsync, fd);
}

int mkdir(const char *name, mode_t mode)
{
    return fails('m', AT_FDCWD, name) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, name, mode);
}

int rename(const char *from, const char *to)
{
    return fails('r', AT_FDCWD, to) ? -1 : syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlinkat(int folder, const char *name, int flags)
{
    return fails('u', folder, name) ? -1 : syscall(SYS_unlinkat, folder, name, flags);
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

int rmdir(const char *name)
{
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}

int clock_gettime(clockid_t which, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, which, now);
    if (!failed && page && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE) && getpid() != page->spared)
        now->tv_sec += page->clock_s;
    return failed;
}
