/* A disk that fails or is slow: the first FAULT_EIO calls of fsync answer EIO, each waits FAULT_SLOW_MS. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

int fsync(int fd)
{
    static int calls = 0;
    const char *bad = getenv("FAULT_EIO"), *slow = getenv("FAULT_SLOW_MS");
    if (slow)
        usleep(1000 * atoi(slow));
    if (bad && __sync_fetch_and_add(&calls, 1) < atoi(bad)) {
        errno = EIO;
        return -1;
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
