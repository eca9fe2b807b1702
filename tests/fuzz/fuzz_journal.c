/* The journal of an interrupted diff. The input is the records after the first, one on each line,
 * without their digests. Whatever they say, the resumed run ends with an error that has a message,
 * or with a patch that is consistent. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/hash.h"
#include "stream/patch/diff.h"
#include "stream/patch/patch_in.h"
#include "tests/fuzz/folder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PARTIAL "p.perta-partial/model.safetensors.perta"

static uint8_t journal[1 << 16], partial[1 << 16];
static size_t identity_bytes, partial_bytes;
static volatile sig_atomic_t stop;

static size_t take(const char *name, uint8_t *to, size_t room)
{
    FILE *file = fopen(name, "r");
    size_t n = file ? fread(to, 1, room, file) : 0;
    if (file)
        fclose(file);
    return n;
}

/* Three tensors of 12 bytes, all elements of one value. */
static void put_model(const char *name, int value)
{
    static const char json[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[12],\"data_offsets\":[0,12]},"
                               "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[12,24]},"
                               "\"c\":{\"dtype\":\"BF16\",\"shape\":[6],\"data_offsets\":[24,36]}}";
    const uint64_t n = sizeof json - 1;
    uint8_t file[8 + sizeof json - 1 + 36];
    char path[64];
    memcpy(file, &n, 8);
    memcpy(file + 8, json, n);
    memset(file + 8 + n, value, 36);
    if (mkdir(name, 0777))
        abort();
    snprintf(path, sizeof path, "%s/model.safetensors", name);
    put_file(path, file, sizeof file);
}

static void on_progress(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    stop = 1;
}

/* Stopped after its chunks and before its table; or resumed. */
static int diff(bool resume, struct perta_err *err)
{
    struct perta_run run = {.memory_bytes = perta_memory_now() + (64 << 20),
                            .n_threads = 1,
                            .io = PERTA_IO_PREAD,
                            .cancel = &stop,
                            .resume = resume,
                            .progress = resume ? NULL : on_progress};
    struct perta_diff job = {.before = "a", .after = "b", .patch = "p"};
    json_t *summary = NULL;
    int rc = perta_diff(&job, &run, &summary, err);
    if (rc ? rc != err->code || !err->msg[0] || summary : !summary)
        __builtin_trap();
    json_decref(summary);
    return rc;
}

static void remove_output(void)
{
    static const char *const paths[] = {PARTIAL,           "p.perta-partial/manifest.json",
                                        "p.perta-partial", "p/model.safetensors.perta",
                                        "p/manifest.json", "p",
                                        "p.perta-journal"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        remove(paths[i]);
}

static void enter(void)
{
    struct perta_err err = {0};
    make_folder();
    if (chdir(dir))
        abort();
    setenv("PERTA_COMMIT_SECONDS", "0", 1);
    put_model("a", 1);
    put_model("b", 2);
    if (diff(false, &err) != PERTA_EINTR)
        abort();
    stop = 0;
    partial_bytes = take(PARTIAL, partial, sizeof partial);
    size_t n = take("p.perta-journal", journal, sizeof journal);
    const char *first = memchr(journal, '\n', n);
    if (!first || !partial_bytes)
        abort();
    identity_bytes = (size_t)(first + 1 - (char *)journal);
}

static void put_journal(const uint8_t *data, size_t size)
{
    FILE *file = fopen("p.perta-journal", "w");
    if (!file || fwrite(journal, 1, identity_bytes, file) != identity_bytes)
        abort();
    for (const uint8_t *at = data, *end; at < data + size; at = end + 1) {
        end = memchr(at, '\n', (size_t)(data + size - at));
        end = end ? end : data + size;
        size_t n = (size_t)(end - at);
        fprintf(file, "%016llx ", (unsigned long long)perta_hash64(at, n));
        if (fwrite(at, 1, n, file) != n)
            abort();
        fputc('\n', file);
    }
    fclose(file);
}

static void check_patch(void)
{
    struct perta_patch_in in = {0};
    struct perta_err err = {0};
    if (perta_patch_in_open(&in, "p", &err)) {
        fprintf(stderr, "%s\n", err.msg);
        __builtin_trap();
    }
    perta_patch_in_close(&in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct perta_err err = {0};
    if (!dir[0])
        enter();
    remove_output();
    mkdir("p.perta-partial", 0777);
    put_file(PARTIAL, partial, partial_bytes);
    put_journal(data, size);
    if (!diff(true, &err))
        check_patch();
    return 0;
}
