#include "stream/cpus.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what the files say ---- */

unsigned perta_cpus_of_quota(const char *text)
{
    char *end;
    unsigned long long quota = strtoull(text, &end, 10); /* "max" is not a number */
    if (end == text || *end != ' ' || *text == '-' || !quota)
        return 0;
    const char *second = end + 1;
    unsigned long long period = strtoull(second, &end, 10);
    if (end == second || *second == '-' || !period || (*end && *end != '\n'))
        return 0;
    unsigned long long n = quota / period + (quota % period > 0);
    return n < UINT_MAX ? (unsigned)n : UINT_MAX;
}

/* Take the next word up to one of ends, and skip that character. False at the end of the text. */
static bool next_word(const char **at, const char *ends, const char **word, size_t *len)
{
    if (!**at)
        return false;
    *word = *at;
    *len = strcspn(*at, ends);
    *at += *len;
    *at += **at != 0;
    return true;
}

static bool is_word(const char *word, size_t len, const char *wanted)
{
    return len == strlen(wanted) && !memcmp(word, wanted, len);
}

static bool lists(const char *words, size_t len, const char *wanted)
{
    for (size_t i = 0; i < len;) {
        size_t n = strcspn(words + i, ", \n:");
        n = n < len - i ? n : len - i;
        if (is_word(words + i, n, wanted))
            return true;
        i += n + 1;
    }
    return false;
}

/* Decode blanks and the like, which are written as \ooo. False if the path is too long. */
static bool unescape(const char *word, size_t len, char *path)
{
    size_t n = 0;
    for (size_t i = 0; i < len; n++) {
        if (n + 1 == PERTA_CGROUP_PATH_MAX)
            return false;
        if (word[i] == '\\' && len - i >= 4 && strspn(word + i + 1, "01234567") >= 3) {
            path[n] = (char)((word[i + 1] & 3) << 6 | (word[i + 2] & 7) << 3 | (word[i + 3] & 7));
            i += 4;
        } else {
            path[n] = word[i++];
        }
    }
    path[n] = 0;
    return true;
}

bool perta_cgroup_line(const char *line, bool v2, char *path)
{
    const char *number, *controllers, *name;
    size_t number_len, controllers_len, len;
    if (!next_word(&line, ":", &number, &number_len) ||
        !next_word(&line, ":", &controllers, &controllers_len) ||
        !next_word(&line, "\n", &name, &len) || *name != '/')
        return false;
    bool is_v2 = is_word(number, number_len, "0") && !controllers_len;
    if (v2 ? !is_v2 : !lists(controllers, controllers_len, "cpu"))
        return false;
    if (len >= PERTA_CGROUP_PATH_MAX)
        return false;
    memcpy(path, name, len);
    path[len] = 0;
    return true;
}

/* id parent major:minor root mount options [tags...] - type source super-options */
bool perta_cgroup_mount_line(const char *line, bool v2, char *root, char *mount)
{
    enum { ROOT = 3, MOUNT = 4 };
    const char *words[MOUNT + 1], *word;
    size_t lens[MOUNT + 1], len;
    for (int i = 0; i <= MOUNT; i++)
        if (!next_word(&line, " \n", &words[i], &lens[i]))
            return false;
    do
        if (!next_word(&line, " \n", &word, &len))
            return false;
    while (!is_word(word, len, "-"));
    if (!next_word(&line, " \n", &word, &len) || !is_word(word, len, v2 ? "cgroup2" : "cgroup"))
        return false;
    for (int i = 0; i < 2 && !v2; i++)
        if (!next_word(&line, " \n", &word, &len))
            return false;
    if (!v2 && !lists(word, len, "cpu"))
        return false;
    return unescape(words[ROOT], lens[ROOT], root) && unescape(words[MOUNT], lens[MOUNT], mount);
}

/* ---- where the files are ---- */

struct cgroup {
    bool v2;
    char path[PERTA_CGROUP_PATH_MAX]; /* the process's */
    char root[PERTA_CGROUP_PATH_MAX]; /* what is visible at mount */
    char mount[PERTA_CGROUP_PATH_MAX];
};

static bool is_cgroup(const char *line, struct cgroup *c)
{
    return perta_cgroup_line(line, c->v2, c->path);
}

static bool is_mount(const char *line, struct cgroup *c)
{
    return perta_cgroup_mount_line(line, c->v2, c->root, c->mount);
}

static FILE *open_below(const char *folder, const char *name)
{
    char *path;
    if (asprintf(&path, "%s%s", folder, name) < 0)
        return NULL;
    FILE *file = fopen(path, "re");
    free(path);
    return file;
}

/* Find the first line of the file for which is() holds. */
static bool find_line(const char *root, const char *name,
                      bool (*is)(const char *line, struct cgroup *c), struct cgroup *c)
{
    FILE *file = open_below(root, name);
    char *line = NULL;
    size_t room = 0;
    bool found = false;
    while (file && !found && getline(&line, &room, file) > 0)
        found = is(line, c);
    free(line);
    if (file)
        fclose(file);
    return found;
}

/* Read the file's first line, without the line break. */
static bool read_line(const char *folder, const char *name, char *text, int size)
{
    FILE *file = open_below(folder, name);
    bool has = file && fgets(text, size, file);
    if (has)
        text[strcspn(text, "\n")] = 0;
    if (file)
        fclose(file);
    return has;
}

static unsigned quota_at(const char *folder, bool v2)
{
    char text[64], period[64];
    if (v2)
        return read_line(folder, "/cpu.max", text, sizeof text) ? perta_cpus_of_quota(text) : 0;
    if (!read_line(folder, "/cpu.cfs_quota_us", text, sizeof text / 2) ||
        !read_line(folder, "/cpu.cfs_period_us", period, sizeof period / 2))
        return 0;
    strcat(strcat(text, " "), period);
    return perta_cpus_of_quota(text);
}

/* 0 means no limit. */
static unsigned smaller(unsigned a, unsigned b)
{
    return !a || (b && b < a) ? b : a;
}

/* The process's cgroup as a path below the mount point. If it is not below what is mounted there (a
 * container that sees its host's names), use the mount point itself. */
static const char *below_mount(const struct cgroup *c)
{
    size_t len = strcmp(c->root, "/") ? strlen(c->root) : 0;
    bool is_below = !strncmp(c->path, c->root, len) && (!c->path[len] || c->path[len] == '/');
    return is_below && !strstr(c->path, "/..") ? c->path + len : "";
}

/* The smallest quota from the process's cgroup up to the mount point. */
static unsigned smallest_quota(const char *root, const struct cgroup *c)
{
    char *folder;
    if (asprintf(&folder, "%s%s%s", root, c->mount, below_mount(c)) < 0)
        return 0;
    unsigned n = 0;
    for (size_t top = strlen(root) + strlen(c->mount);;) {
        n = smaller(n, quota_at(folder, c->v2));
        char *last = strrchr(folder, '/');
        if (strlen(folder) <= top || !last)
            break;
        *last = 0;
    }
    free(folder);
    return n;
}

unsigned perta_cpus_of_cgroups(const char *root)
{
    unsigned n = 0;
    struct cgroup *c = malloc(sizeof *c);
    for (int v2 = 0; c && v2 <= 1; v2++) {
        c->v2 = v2;
        if (find_line(root, "/proc/self/cgroup", is_cgroup, c) &&
            find_line(root, "/proc/self/mountinfo", is_mount, c))
            n = smaller(n, smallest_quota(root, c));
    }
    free(c);
    return n;
}

unsigned perta_cpus_of_affinity(void)
{
    enum { FIRST = 1024, MOST = 1 << 20 }; /* the kernel refuses a smaller set than its own */
    for (size_t most = FIRST; most <= MOST; most *= 2) {
        cpu_set_t *set = CPU_ALLOC(most);
        size_t size = CPU_ALLOC_SIZE(most);
        int n = set && !sched_getaffinity(0, size, set) ? CPU_COUNT_S(size, set) : 0;
        bool too_small = set && !n && errno == EINVAL;
        CPU_FREE(set);
        if (!too_small)
            return (unsigned)n;
    }
    return 0;
}

/* ---- once ---- */

static unsigned available;

static void count(void)
{
    available = smaller(perta_cpus_of_affinity(), perta_cpus_of_cgroups(""));
    if (!available)
        available = 1;
}

unsigned perta_cpus_available(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, count);
    return available;
}
