/* Records where memory is short: each allocation of jansson's in turn fails. What comes of it is the
 * whole of what it should be, or an error; never a record that lacks a part. */
#include "tests/scratch.h"

#include <sys/stat.h>

#include "io/safetensors.h"
#include "stream/diff.h"
#include "stream/manifest.h"
#include "stream/patch_in.h"
#include "stream/stream.h"

static struct perta_err err;

/* ---- jansson's memory ---- */

static uint64_t n_taken, fails_at; /* counted from 1; 0: none fails */

static void *take(size_t len_bytes)
{
    return ++n_taken == fails_at ? NULL : malloc(len_bytes);
}

/* From now on the nth fails. */
static void fail_at(uint64_t n)
{
    n_taken = 0;
    fails_at = n;
    err = (struct perta_err){0};
}

/* ---- two models, and what is made of them ---- */

static struct perta_run run;

/* Sanitizers hold on to what is freed, so it takes more and more. */
static void give_memory(void)
{
    run.memory_bytes = perta_memory_now() + (64 << 20);
}

static void put_model(const char *folder, uint8_t byte)
{
    struct perta_tensor tensors[3] = {{.name = "a", .dtype = PERTA_BF16, .n_dims = 1, .n_elems = 40},
                                      {.name = "b", .dtype = PERTA_U8, .n_dims = 1, .n_elems = 40},
                                      {.name = "c", .dtype = PERTA_F32, .n_elems = 1}};
    uint64_t shape = 40, len;
    uint8_t *bytes;
    char path[64];
    tensors[0].shape = tensors[1].shape = &shape;
    ck_assert_ok(perta_safetensors_build(tensors, 3, NULL, &bytes, &len, &err));
    bytes = realloc(bytes, len + 124);
    memset(bytes + len, byte, 124);
    ck_assert_int_eq(mkdir(folder, 0777), 0);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    put_file(path, bytes, len + 124);
    free(bytes);
}

static void enter_models(void)
{
    json_set_alloc_funcs(take, free);
    fail_at(0);
    snprintf(scratch_dir, sizeof scratch_dir, "/dev/shm/perta-test-XXXXXX"); /* syncs cost nothing */
    ck_assert_ptr_nonnull(mkdtemp(scratch_dir));
    ck_assert_int_eq(chdir(scratch_dir), 0);
    put_model("old", 1);
    put_model("new", 3);
    setenv("PERTA_COMMIT_SECONDS", "0", 1);
    run = (struct perta_run){.n_threads = 1, .io = PERTA_IO_PREAD};
    give_memory();
}

static int diff(const char *patch)
{
    struct perta_diff job = {.before = "old", .after = "new", .patch = patch, .force = true};
    json_t *summary = NULL;
    int rc = perta_diff(&job, &run, &summary, &err);
    json_decref(summary);
    return rc;
}

static char *text_of(const char *path, size_t *len)
{
    FILE *file = fopen(path, "r");
    char *text = alloc(1 << 16);
    ck_assert_ptr_nonnull(file);
    *len = fread(text, 1, 1 << 16, file);
    ck_assert_uint_gt(*len, 0);
    fclose(file);
    return text;
}

/* Whichever allocation after the first few fails, job() is an error of the system, or as good as if
 * none did. */
static void try_all(uint64_t few, int (*job)(void), bool (*is_good)(int rc))
{
    for (uint64_t n = few + 1;; n++) {
        give_memory();
        fail_at(n);
        int rc = job();
        bool failed = n_taken >= n;
        fail_at(0);
        ck_assert_msg(rc == PERTA_ESYS || is_good(rc), "allocation %llu: %d",
                      (unsigned long long)n, rc);
        if (!failed)
            return;
    }
}

/* ---- cases ---- */

static char *wanted;

static int make_patch(void)
{
    return diff("p");
}

static bool is_that_patch(int rc)
{
    size_t len;
    char *text = text_of("p/manifest.json", &len);
    bool same = !rc && !strcmp(text, wanted);
    free(text);
    return same;
}

START_TEST(a_patch_has_its_whole_record_or_is_none)
{
    size_t len;
    ck_assert_ok(diff("p"));
    wanted = text_of("p/manifest.json", &len);
    try_all(0, make_patch, is_that_patch);
    free(wanted);
}
END_TEST

static json_t *found;
static size_t n_wanted;

static int verify_patch(void)
{
    json_decref(found);
    return perta_patch_verify("p", &run, &found, &err);
}

static int verify_model(void)
{
    json_decref(found);
    return perta_model_verify("old", "p", true, &run, &found, &err);
}

/* What jansson's parser takes is left alone: some of it crashes without memory. The list, too. */
static uint64_t taken_to_open(void)
{
    struct perta_patch_in patch = {0};
    fail_at(0);
    ck_assert_ok(perta_patch_in_open(&patch, "p", &err));
    uint64_t n = n_taken;
    perta_patch_in_close(&patch);
    return n + 1;
}

static bool lists_all(int rc)
{
    const json_t *list = json_object_get(found, "differences");
    list = list ? list : json_object_get(found, "damaged");
    return rc == PERTA_ECHECK && json_array_size(list) == n_wanted;
}

/* The last byte of every frame, which is of its checksum. */
static void damage(const char *path)
{
    size_t len;
    uint64_t n, at;
    uint32_t frame_bytes;
    char *text = text_of(path, &len);
    memcpy(&n, text + len - 24, sizeof n);
    for (uint64_t i = 1; i <= n; i++) {
        memcpy(&at, text + len - 24 - 48 * i, sizeof at);
        memcpy(&frame_bytes, text + len - 24 - 48 * i + 8, sizeof frame_bytes);
        text[at + frame_bytes - 1] ^= 1;
    }
    put_file(path, text, len);
    free(text);
}

START_TEST(what_differs_is_listed_or_nothing_is_said_to_be_sound)
{
    ck_assert_ok(diff("p"));
    n_wanted = 3; /* a, b, c */
    try_all(taken_to_open(), verify_model, lists_all);
    n_wanted = 4; /* and SHA-256 */
    damage("p/model.safetensors.perta");
    try_all(taken_to_open(), verify_patch, lists_all);
    json_decref(found);
}
END_TEST

static int make_manifest(void)
{
    json_decref(found);
    return perta_manifest("old", true, NULL, &run, &found, &err);
}

static bool names_all(int rc)
{
    char *text = json_dumps(found, 0);
    bool same = !rc && text && !strcmp(text, wanted);
    free(text);
    return same;
}

START_TEST(a_manifest_names_everything_or_is_none)
{
    ck_assert_ok(make_manifest());
    wanted = json_dumps(found, 0);
    try_all(0, make_manifest, names_all);
    json_decref(found);
    free(wanted);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("short_memory");
    tcase_add_checked_fixture(tests, enter_models, leave);
    tcase_add_test(tests, a_patch_has_its_whole_record_or_is_none);
    tcase_add_test(tests, what_differs_is_listed_or_nothing_is_said_to_be_sound);
    tcase_add_test(tests, a_manifest_names_everything_or_is_none);
    return run_suite("short_memory", tests);
}
