/* For LD_PRELOAD: records every pwrite, fsync, fdatasync, rename and unlink of files in
 * $TRACE_FOLDER to $TRACE_WRITES, for tests that replay a power cut. Each record is a line of JSON,
 * followed by the bytes of a write, or the new name of a rename. The folder itself has the name
 * ".". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The file's name in the folder; NULL if it is elsewhere. */
static const char *name_of(int fd, char *path, size_t room)
{
    char link[64];
    const char *folder = getenv("TRACE_FOLDER");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, room - 1);
    if (n < 0 || !folder)
        return NULL;
    path[n] = 0;
    size_t len = strlen(folder);
    if (strncmp(path, folder, len))
        return NULL;
    return !path[len] ? "." : path[len] == '/' ? path + len + 1 : NULL;
}

static void record(const char *what, const char *name, long long off, const void *data, size_t n)
{
    char line[4200];
    static int fd = -1;
    static ssize_t (*put)(int, const void *, size_t);
    if (fd < 0) {
        const char *log = getenv("TRACE_WRITES");
        if (!log)
            abort();
        fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        put = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    }
    int len = snprintf(line, sizeof line,
                       "{\"what\": \"%s\", \"file\": \"%s\", \"offset\": %lld, \"bytes\": %zu}\n",
                       what, name, off, n);
    if (put(fd, line, (size_t)len) != len || (n && put(fd, data, n) != (ssize_t)n))
        abort();
}

ssize_t pwrite64(int fd, const void *data, size_t n, off_t off)
{
    static ssize_t (*real)(int, const void *, size_t, off_t);
    char path[4096];
    const char *name = name_of(fd, path, sizeof path);
    if (!real)
        real = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    ssize_t got = real(fd, data, n, off);
    if (name && got > 0)
        record("write", name, off, data, (size_t)got);
    return got;
}

static int synced(int fd, const char *call)
{
    char path[4096];
    const char *name = name_of(fd, path, sizeof path);
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, call);
    int rc = real(fd);
    if (name && !rc)
        record("sync", name, 0, NULL, 0);
    return rc;
}

int fsync(int fd)
{
    return synced(fd, "fsync");
}

int fdatasync(int fd)
{
    return synced(fd, "fdatasync");
}

/* A path's name in the folder; NULL if it is elsewhere. */
static const char *within(const char *path)
{
    const char *folder = getenv("TRACE_FOLDER"), *slash = strrchr(path, '/');
    char whole[4096], *end;
    if (!folder || !slash || !realpath(path, whole))
        return NULL;
    end = strrchr(whole, '/');
    *end = 0;
    return !strcmp(whole, folder) ? slash + 1 : NULL;
}

int rename(const char *from, const char *to)
{
    static int (*real)(const char *, const char *);
    if (!real)
        real = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    const char *name = within(from), *slash = strrchr(to, '/');
    int rc = real(from, to);
    if (!rc && name && slash)
        record("rename", name, 0, slash + 1, strlen(slash + 1));
    return rc;
}

int unlink(const char *path)
{
    static int (*real)(const char *);
    if (!real)
        real = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    const char *name = within(path);
    int rc = real(path);
    if (!rc && name)
        record("unlink", name, 0, NULL, 0);
    return rc;
}
