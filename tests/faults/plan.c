#include "tests/faults/faults.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KINDS_MAX 24

static struct fault_plan plan;
static uint64_t random_state, n_reads;
static struct {
    char name[16];
    uint64_t n;
} kinds[KINDS_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static unsigned number_of(const char *value)
{
    return (unsigned)strtoul(value, NULL, 10);
}

/* "N:TEXT" */
static const char *split(const char *value, uint64_t *n)
{
    char *end;
    *n = strtoull(value, &end, 10);
    return *end == ':' ? end + 1 : end;
}

/* "KIND:N:NUMBER" */
static int split_kind(char *value, char kind[16], uint64_t *n)
{
    snprintf(kind, 16, "%.15s", strsep(&value, ":"));
    const char *number = split(value ? value : "", n);
    if (!*number)
        abort();
    return (int)number_of(number);
}

static void set(const char *name, char *value)
{
    if (!strcmp(name, "seed"))
        random_state = strtoull(value, NULL, 10);
    else if (!strcmp(name, "short"))
        plan.short_ = number_of(value);
    else if (!strcmp(name, "again"))
        plan.again = number_of(value);
    else if (!strcmp(name, "late"))
        plan.late = number_of(value);
    else if (!strcmp(name, "forever"))
        plan.forever = number_of(value);
    else if (!strcmp(name, "fast"))
        plan.fast = number_of(value);
    else if (!strcmp(name, "log"))
        plan.log = value;
    else if (!strcmp(name, "count"))
        plan.count = value;
    else if (!strcmp(name, "shrink"))
        plan.shrink = split(value, &plan.shrink_at);
    else if (!strcmp(name, "touch"))
        plan.touch = split(value, &plan.touch_at);
    else if (!strcmp(name, "shutdown"))
        plan.shutdown = split(value, &plan.shutdown_at);
    else if (!strcmp(name, "fail"))
        plan.fail_errno = split_kind(value, plan.fail, &plan.fail_at);
    else if (!strcmp(name, "signal"))
        plan.signal_number = split_kind(value, plan.signal, &plan.signal_at);
    else {
        fprintf(stderr, "PERTA_FAULTS: %s\n", name);
        abort();
    }
}

static void say_counts(void)
{
    FILE *file = fopen(plan.count, "w");
    for (int i = 0; file && i < KINDS_MAX && *kinds[i].name; i++)
        fprintf(file, "%s %llu\n", kinds[i].name, (unsigned long long)kinds[i].n);
    if (file)
        fclose(file);
}

static void parse(void)
{
    static char text[4096];
    char *rest = text;
    snprintf(text, sizeof text, "%s", getenv("PERTA_FAULTS") ? getenv("PERTA_FAULTS") : "");
    for (char *word; (word = strsep(&rest, ",")) && *word;) {
        char *name = strsep(&word, "=");
        set(name, word ? word : name + strlen(name));
    }
    if (plan.count)
        atexit(say_counts);
}

const struct fault_plan *fault_plan(void)
{
    pthread_once(&once, parse);
    return &plan;
}

uint64_t fault_random(uint64_t n)
{
    fault_plan();
    pthread_mutex_lock(&lock); /* SplitMix64 */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    pthread_mutex_unlock(&lock);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
}

bool fault_chance(unsigned of_1000)
{
    return of_1000 && fault_random(1000) < of_1000;
}

/* Counts one more operation of that kind; returns its number. */
static uint64_t count_one(const char *kind)
{
    int i = 0;
    pthread_mutex_lock(&lock);
    while (*kinds[i].name && strcmp(kinds[i].name, kind))
        i++;
    snprintf(kinds[i].name, sizeof kinds[i].name, "%s", kind);
    uint64_t n = ++kinds[i].n;
    pthread_mutex_unlock(&lock);
    return n;
}

int fault_strikes(const char *kind)
{
    const struct fault_plan *p = fault_plan();
    uint64_t n = count_one(kind);
    if (n == p->signal_at && !strcmp(kind, p->signal))
        kill(getpid(), p->signal_number);
    return !strcmp(kind, p->fail) && (n == p->fail_at || (p->forever && n > p->fail_at))
               ? p->fail_errno
               : 0;
}

static void shrink(const char *path)
{
    struct stat st;
    if (stat(path, &st) || truncate(path, st.st_size / 2))
        abort();
}

static void touch(const char *path)
{
    struct stat st;
    uint8_t byte;
    int fd = open(path, O_RDWR);
    if (fd < 0 || fstat(fd, &st) || pread(fd, &byte, 1, st.st_size / 2) != 1)
        abort();
    byte ^= 1;
    if (pwrite(fd, &byte, 1, st.st_size / 2) != 1 || close(fd))
        abort();
}

void fault_after_read(void)
{
    const struct fault_plan *p = fault_plan();
    uint64_t n = __atomic_add_fetch(&n_reads, 1, __ATOMIC_RELAXED);
    if (p->shrink && n == p->shrink_at)
        shrink(p->shrink);
    if (p->touch && n == p->touch_at)
        touch(p->touch);
}
