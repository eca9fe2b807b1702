/* A host program with its own settings: a handler for SIGBUS, flush-to-zero, rounding upwards. The
 * library leaves them unchanged, and gives the same bytes as without them. Built against
 * libperta.so here, and against the installed library by tests/install.sh. It works in a scratch
 * folder. */
#include <fcntl.h>
#include <perta.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/strange_fp.h"

#define N 5000

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "host: %s\n", what);
    exit(1);
}

/* ---- its inputs ---- */

/* A checkpoint of one tensor with many subnormal numbers. */
static void write_model(const char *folder, uint32_t seed)
{
    static const char header[] =
        "{\"w\":{\"dtype\":\"F32\",\"shape\":[5000],\"data_offsets\":[0,20000]}}";
    char path[64];
    float data[N];
    uint64_t len = sizeof header - 1;
    for (int i = 0; i < N; i++) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = ((float)(seed >> 8) * 0x1p-24f - 0.5f) * (i % 3 ? 0x1p-128f : 1);
    }
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    check(!perta_make_parents(path, &(struct perta_err){0}), folder);
    FILE *file = fopen(path, "w");
    check(file && fwrite(&len, 8, 1, file) && fwrite(header, len, 1, file) &&
              fwrite(data, sizeof data, 1, file) && !fclose(file),
          path);
}

/* ---- its handler ---- */

static sigjmp_buf back;
static volatile sig_atomic_t n_called, n_told;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    n_called++;
    siglongjmp(back, 1);
}

/* Touch a page of its own file, which has been truncated. */
static void bus_error(void)
{
    int fd = open("gone", O_RDWR | O_CREAT | O_TRUNC, 0600);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    check(fd >= 0 && !ftruncate(fd, (off_t)page), "gone");
    volatile char *map = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);
    check(map != MAP_FAILED && !ftruncate(fd, 0), "gone");
    int before = n_called;
    if (!sigsetjmp(back, 1))
        (void)map[0];
    check(n_called == before + 1, "its handler was not called for its own bus error");
    munmap((void *)(uintptr_t)map, page);
    close(fd);
}

static void on_progress(void *user, uint64_t done_bytes, uint64_t total_bytes)
{
    (void)done_bytes, (void)total_bytes;
    n_told++;
    if (*(bool *)user) /* while files are mapped */
        bus_error();
}

/* ---- what it asks for ---- */

static void edit(float out[N])
{
    static float model[N], tuned[N];
    const struct perta_rule rule = {.method = PERTA_TV};
    const struct perta_edit_in in = {
        .model = {PERTA_F32, model}, .tuned = {PERTA_F32, tuned}, .n = N};
    const float alpha = 0.3f;
    void *const outs[] = {out};
    struct perta_edit_counts counts;
    for (uint32_t i = 0; i < N; i++) { /* fills bits directly, without arithmetic */
        uint32_t a = i * 77, b = 0x80000000u | i * 1001;
        memcpy(&model[i], &a, 4);
        memcpy(&tuned[i], &b, 4);
    }
    perta_edit(&rule, &in, &alpha, 1, outs, &counts);
}

static void run_jobs(const char *patch, const char *unlearned, bool strange)
{
    struct perta_run run = {.memory_bytes = PERTA_MEMORY_DEFAULT,
                            .n_threads = 2,
                            .io = PERTA_IO_MMAP,
                            .progress = on_progress,
                            .progress_user = &strange};
    struct perta_diff diff = {.before = "a", .after = "b", .patch = patch};
    struct perta_unlearn unlearn = {.model = "a",
                                    .tuned = "b",
                                    .base = "c",
                                    .n_alphas = 1,
                                    .alphas = {{0.3f, "0.3"}},
                                    .rule = {.method = PERTA_TV},
                                    .patch = unlearned};
    struct perta_err err;
    json_t *summary;
    memset(&err, 0xa5, sizeof err); /* like uninitialised variables on the stack */
    check(perta_diff(&(struct perta_diff){0}, &run, &summary, &err) == PERTA_EUSAGE && !summary &&
              strstr(err.msg, "--patch DIR"),
          "a verb that is asked for nothing");
    check(!perta_diff(&diff, &run, &summary, &err), err.msg);
    json_decref(summary);
    check(!perta_unlearn(&unlearn, &run, &summary, &err), err.msg);
    json_decref(summary);
}

static void is_same(const char *a, const char *b, const char *name)
{
    char command[256];
    snprintf(command, sizeof command, "cmp %s/%s %s/%s", a, name, b, name);
    check(!system(command), "other bytes");
}

int main(void)
{
    static float plain[N], strange[N];
    char folder[] = "/tmp/perta-host-XXXXXX", command[64];
    check(mkdtemp(folder) && !chdir(folder), folder);
    for (uint32_t i = 0; i < 3; i++)
        write_model((const char *[]){"a", "b", "c"}[i], i + 1);
    edit(plain);
    run_jobs("plain-d", "plain-u", false);

    struct sigaction now, own = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGBUS, &own, NULL);
    strange_fp_set(N_STRANGE_FP - 2); /* rounds upwards and flushes everything to zero */
    unsigned before = strange_fp_state();
    edit(strange);
    check(strange_fp_state() == before, "its floating-point environment is another after an edit");
    n_told = 0;
    run_jobs("strange-d", "strange-u", true);
    check(strange_fp_state() == before, "its floating-point environment is another after a run");
    check(n_told > 0 && n_called == n_told, "it was not told of progress");
    sigaction(SIGBUS, NULL, &now);
    check(now.sa_sigaction == on_bus_error && now.sa_flags & SA_NODEFER, "its handler has gone");
    bus_error();

    check(!memcmp(plain, strange, sizeof plain), "an edit gave other bytes");
    for (int i = 0; i < 2; i++) {
        const char *name = (const char *[]){"model.safetensors.perta", "manifest.json"}[i];
        is_same("plain-d", "strange-d", name);
        is_same("plain-u", "strange-u", name);
    }
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command) ? 1 : 0;
}
