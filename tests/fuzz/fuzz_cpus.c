/* Files of /proc and of control groups, line by line: whatever they say, the result is a path or a
 * count. */
#include "stream/cpus.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The path fits its buffer and is terminated. */
static void check_path(const char *path)
{
    if (!memchr(path, 0, PERTA_CGROUP_PATH_MAX))
        __builtin_trap();
}

static void use_line(const char *line)
{
    char *a = malloc(PERTA_CGROUP_PATH_MAX), *b = malloc(PERTA_CGROUP_PATH_MAX);
    for (int v2 = 0; v2 <= 1 && a && b; v2++) {
        if (perta_cgroup_line(line, v2, a)) {
            check_path(a);
            if (*a != '/')
                __builtin_trap();
        }
        if (perta_cgroup_mount_line(line, v2, a, b)) {
            check_path(a);
            check_path(b);
        }
    }
    perta_cpus_of_quota(line);
    free(a);
    free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (size_t at = 0; at < size;) { /* each line with its newline, as getline gives it, in a
                                       * buffer of its own */
        const uint8_t *end = memchr(data + at, '\n', size - at);
        size_t len = end ? (size_t)(end - data) - at + 1 : size - at;
        char *line = malloc(len + 1);
        if (!line)
            return 0;
        memcpy(line, data + at, len);
        line[len] = 0;
        use_line(line);
        free(line);
        at += len;
    }
    return 0;
}
