/* Every verb of the library when memory, or the number of open files, runs out: each call that asks
 * for some fails in turn (tests/short_of.h). The result is either a system error, which leaves
 * nothing or what --resume continues from; or the whole correct output, byte-identical. */
#include "tests/short_of.h"

#include <sys/stat.h>

#include "estimators/edit/unlearn.h"
#include "estimators/model/config.h"
#include "estimators/model/samples.h"
#include "estimators/passes/accumulate.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/eval.h"
#include "estimators/passes/tune.h"
#include "estimators/steps/steps.h"
#include "io/format/canonical.h"
#include "io/format/safetensors.h"
#include "io/hash.h"
#include "stream/patch/apply.h"
#include "stream/patch/compose.h"
#include "stream/patch/dequantize.h"
#include "stream/patch/diff.h"
#include "stream/patch/manifest.h"
#include "stream/patch/patch_in.h"
#include "stream/stream.h"
#include "tests/scratch.h"

extern char __executable_start;
static struct perta_err err;
static struct perta_run run;

/* ---- inputs: a model of two shards that can be computed with, and the other folders ---- */

static const char config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"vocab_size\":23,"
    "\"hidden_size\":8,\"intermediate_size\":12,\"num_hidden_layers\":1,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1}";
static const char lora[] =
    "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"target_modules\":[\"q_proj\"],\"sic\":1}";

struct put {
    const char *name;
    uint64_t rows, cols; /* cols 0: a vector */
};

#define LAYER "model.layers.0."
static const struct put shards[2][6] = {{{"model.embed_tokens.weight", 23, 8},
                                         {LAYER "input_layernorm.weight", 8, 0},
                                         {LAYER "self_attn.q_proj.weight", 8, 8},
                                         {LAYER "self_attn.k_proj.weight", 4, 8},
                                         {LAYER "self_attn.v_proj.weight", 4, 8},
                                         {LAYER "self_attn.o_proj.weight", 8, 8}},
                                        {{LAYER "mlp.down_proj.weight", 8, 12},
                                         {LAYER "mlp.gate_proj.weight", 12, 8},
                                         {LAYER "mlp.up_proj.weight", 12, 8},
                                         {LAYER "post_attention_layernorm.weight", 8, 0},
                                         {"lm_head.weight", 23, 8},
                                         {"model.norm.weight", 8, 0}}};
static const struct put adapter[2] = {
    {"base_model.model." LAYER "self_attn.q_proj.lora_A.weight", 2, 8},
    {"base_model.model." LAYER "self_attn.q_proj.lora_B.weight", 8, 2}};

static char *join(const char *folder, const char *name)
{
    char *path = NULL;
    ck_assert_int_ge(asprintf(&path, "%s/%s", folder, name), 0);
    return path;
}

static void put_in(const char *folder, const char *name, const void *data, size_t len)
{
    char *path = join(folder, name);
    put_file(path, data, len);
    free(path);
}

/* Fill tensors with numbers in [-1/2, 1/2). */
static void put_tensors(const char *folder, const char *name, const struct put *puts, size_t n,
                        enum perta_dtype dtype, uint64_t seed)
{
    struct perta_tensor tensors[12] = {0};
    uint64_t shapes[12][2], len, width = perta_dtype_unit_bytes(dtype), n_elems = 0;
    for (size_t i = 0; i < n; i++) {
        shapes[i][0] = puts[i].rows;
        shapes[i][1] = puts[i].cols;
        tensors[i] =
            (struct perta_tensor){.name = (char *)(uintptr_t)puts[i].name,
                                  .dtype = dtype,
                                  .n_dims = puts[i].cols ? 2 : 1,
                                  .shape = shapes[i],
                                  .n_elems = puts[i].rows * (puts[i].cols ? puts[i].cols : 1)};
        n_elems += tensors[i].n_elems;
    }
    uint8_t *bytes = make_header(tensors, n, n_elems * width, &len);
    for (uint64_t i = 0; i < n_elems; i++) {
        float value = (float)(next_random(&seed) >> 40) * 0x1p-24f - 0.5f;
        memcpy(bytes + len + i * width, (uint8_t *)&value + 4 - width, width);
    }
    put_in(folder, name, bytes, len + n_elems * width);
    free(bytes);
}

static void put_checkpoint(const char *folder, enum perta_dtype dtype, uint64_t seed)
{
    static const char *const names[] = {"model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors"};
    json_t *map = json_object();
    ck_assert_int_eq(mkdir(folder, 0777), 0);
    for (int s = 0; s < 2; s++) {
        put_tensors(folder, names[s], shards[s], 6, dtype, seed + (uint64_t)s);
        for (int i = 0; i < 6; i++)
            json_object_set_new(map, shards[s][i].name, json_string(names[s]));
    }
    json_t *index = json_pack("{s:{}, s:o}", "metadata", "weight_map", map);
    char *text = json_dumps(index, 0);
    put_in(folder, "model.safetensors.index.json", text, strlen(text));
    if (dtype == PERTA_BF16) /* an importance has no config */
        put_in(folder, "config.json", config, strlen(config));
    free(text);
    json_decref(index);
}

/* FP8, with its scales in another shard. */
static void put_quantised(void)
{
    static const struct put codes[] = {{"a.weight", 9, 5}, {"b.weight", 4, 70}};
    static const struct put scales[] = {{"a.weight_scale_inv", 3, 5}, {"b.weight_scale_inv", 1, 1}};
    static const char fp8[] = "{\"quantization_config\": {\"quant_method\": \"fp8\"}, \"a\": {}}";
    ck_assert_int_eq(mkdir("in/fp8", 0777), 0);
    put_tensors("in/fp8", "codes.safetensors", codes, 2, PERTA_F8_E4M3, 61);
    put_tensors("in/fp8", "scales.safetensors", scales, 2, PERTA_F32, 71);
    put_in("in/fp8", "config.json", fp8, strlen(fp8));
}

/* Sanitizers retain freed memory, so the process grows. */
static void give_memory(void)
{
    run.memory_bytes = perta_memory_now() + (128 << 20);
}

static void make(int rc)
{
    ck_assert_msg(!rc, "%s", err.msg);
}

static void make_patches(void)
{
    json_t *summary[3];
    const struct perta_diff there = {
        .before = "in/model", .after = "in/tuned", .patch = "in/patch"};
    const struct perta_diff on = {.before = "in/tuned", .after = "in/base", .patch = "in/next"};
    make(perta_diff(&there, &run, &summary[0], &err));
    make(perta_diff(&on, &run, &summary[1], &err));
    make(perta_manifest("in/model", true, NULL, &run, &summary[2], &err));
    json_dump_file(summary[2], "in/model.json", 0);
    json_array_remove(json_object_get(summary[2], "files"), 0);
    json_object_set_new(json_array_get(json_object_get(summary[2], "files"), 0), "sha256",
                        json_string("forged"));
    json_dump_file(summary[2], "in/forged.json", 0);
    for (int i = 0; i < 3; i++)
        json_decref(summary[i]);
}

/* Damage the last byte of every frame, which belongs to its checksum. */
static void put_damaged(void)
{
    char *text = alloc(1 << 16);
    ck_assert_int_eq(system("cp -r in/patch in/damaged"), 0);
    FILE *file = fopen("in/damaged/model-00001-of-00002.safetensors.perta", "r+");
    ck_assert_ptr_nonnull(file);
    size_t len = fread(text, 1, 1 << 16, file);
    uint64_t n, at;
    uint32_t frame_bytes;
    memcpy(&n, text + len - 24, sizeof n);
    for (uint64_t i = 1; i <= n; i++) {
        memcpy(&at, text + len - 24 - 48 * i, sizeof at);
        memcpy(&frame_bytes, text + len - 24 - 48 * i + 8, sizeof frame_bytes);
        text[at + frame_bytes - 1] ^= 1;
    }
    ck_assert_int_eq(fseek(file, 0, SEEK_SET), 0);
    ck_assert_uint_eq(fwrite(text, 1, len, file), len);
    fclose(file);
    free(text);
}

static void enter_inputs(void)
{
    fail_at(MEMORY, 0);
    fail_at(FILES, 0);
    snprintf(scratch_dir, sizeof scratch_dir,
             "/dev/shm/perta-test-XXXXXX"); /* there syncs are free */
    ck_assert_ptr_nonnull(mkdtemp(scratch_dir));
    ck_assert_int_eq(chdir(scratch_dir), 0);
    setenv("PERTA_COMMIT_SECONDS", "0", 1);
    ck_assert_int_eq(mkdir("in", 0777) | mkdir("in/lora", 0777), 0);
    put_checkpoint("in/model", PERTA_BF16, 1);
    put_checkpoint("in/tuned", PERTA_BF16, 11);
    put_checkpoint("in/base", PERTA_BF16, 21);
    put_checkpoint("in/forget", PERTA_F32, 31);
    put_checkpoint("in/retain", PERTA_F32, 41);
    put_quantised();
    put_in("in/lora", "adapter_config.json", lora, strlen(lora));
    put_tensors("in/lora", "adapter_model.safetensors", adapter, 2, PERTA_F32, 51);
    put_text("in/a.jsonl",
             "{\"input_ids\":[3,1,4,1,5,9,2,6],\"perturbed\":[{\"input_ids\":[1,2]}]}\n");
    put_text("in/b.jsonl", "{\"input_ids\":[22,0]}\n{\"input_ids\":[3,7,7,8,2,2,0,1,3]}\n");
    put_text("in/key", "sixteen bytes, or more");
    run = (struct perta_run){.n_threads = 1, .io = PERTA_IO_PREAD};
    give_memory();
    make_patches();
    put_damaged();
}

/* ---- verbs ---- */

static struct perta_unlearn unlearn_with(const char *tuned, enum perta_method method)
{
    return (struct perta_unlearn){.model = "in/model",
                                  .tuned = tuned,
                                  .base = "in/base",
                                  .rule = {.method = method},
                                  .n_alphas = 1,
                                  .alphas = {{1, "1"}, {2, "2"}},
                                  .patch = "out/patch"};
}

static int unlearn(json_t **record)
{
    struct perta_unlearn u = unlearn_with("in/tuned", PERTA_GRAD);
    u.forget = "in/forget";
    u.retain = "in/retain";
    u.n_alphas = 2;
    u.out = "out/model";
    return perta_unlearn(&u, &run, record, &err);
}

static int unlearn_one_way(json_t **record)
{
    static const char *const globs[] = {"*.mlp.*", "lm_head*"};
    struct perta_unlearn u = unlearn_with("in/tuned", PERTA_TV);
    u.one_way = true;
    u.globs = (struct perta_globs){.include = globs, .n_include = 2};
    return perta_unlearn(&u, &run, record, &err);
}

static int unlearn_adapter(json_t **record)
{
    struct perta_unlearn u = unlearn_with("in/lora", PERTA_RANDOM);
    return perta_unlearn(&u, &run, record, &err);
}

static int diff(json_t **record)
{
    const struct perta_diff d = {.before = "in/model", .after = "in/tuned", .patch = "out/patch"};
    return perta_diff(&d, &run, record, &err);
}

static int compose(json_t **record)
{
    static const char *const patches[] = {"in/patch", "in/next"};
    const struct perta_compose c = {
        .patches = patches, .n_patches = 2, .model = "in/model", .patch = "out/patch"};
    return perta_compose(&c, &run, record, &err);
}

static int dequantize(json_t **record)
{
    const struct perta_dequantize d = {.model = "in/fp8", .out = "out/model"};
    return perta_dequantize(&d, &run, record, &err);
}

static int apply(json_t **record)
{
    const struct perta_apply a = {.model = "in/model", .patch = "in/patch", .out = "out/model"};
    return perta_apply(&a, &run, record, &err);
}

static int revert(json_t **record)
{
    const struct perta_apply a = {
        .model = "in/tuned", .patch = "in/patch", .out = "out/model", .mode = PERTA_REVERT};
    return perta_apply(&a, &run, record, &err);
}

static int in_place(json_t **record)
{
    const struct perta_apply a = {.model = "out/model", .patch = "in/patch"};
    return perta_apply(&a, &run, record, &err);
}

static int accumulate(json_t **record)
{
    static const char *const gradients[] = {"in/forget", "in/retain"};
    const struct perta_accumulate a = {
        .gradients = gradients, .n_gradients = 2, .out = "out", .mean = true, .meansq = true};
    return perta_accumulate(&a, &run, record, &err);
}

static int manifest(json_t **record)
{
    return perta_manifest("in/model", true, NULL, &run, record, &err);
}

static int verify_manifest(json_t **record)
{
    return perta_manifest_verify("in/model", "in/model.json", &run, record, &err);
}

static int verify_forged(json_t **record)
{
    return perta_manifest_verify("in/model", "in/forged.json", &run, record, &err);
}

static int verify_patch(json_t **record)
{
    return perta_patch_verify("in/patch", &run, record, &err);
}

static int verify_damaged(json_t **record)
{
    return perta_patch_verify("in/damaged", &run, record, &err);
}

static int verify_model(json_t **record)
{
    return perta_model_verify("in/model", "in/patch", false, &run, record, &err);
}

static int verify_other(json_t **record)
{
    return perta_model_verify("in/model", "in/patch", true, &run, record, &err);
}

/* The output of inspect for a checkpoint and for a patch. */
static int inspect(json_t **record)
{
    struct perta_checkpoint *ck = NULL;
    struct perta_patch_in patch = {0};
    *record = NULL;
    int rc = perta_checkpoint_open("in/model", &ck, &err);
    if (!rc)
        rc = perta_patch_in_open(&patch, "in/patch", &err);
    if (!rc &&
        !(*record = json_pack("{s:I, s:O, s:O}", "tensors", (json_int_t)ck->n_tensors, "config",
                              ck->config, "outputs", json_object_get(patch.manifest, "outputs"))))
        rc = perta_fail_sys(&err, ENOMEM, "inspect");
    perta_patch_in_close(&patch);
    perta_checkpoint_close(ck);
    return rc;
}

#if HAS_MODEL
static int estimate(json_t **record)
{
    const struct perta_estimate e = {.model = "in/model",
                                     .data = "in/b.jsonl",
                                     .data_key = "in/key",
                                     .quantize = PERTA_ROUND_NF4,
                                     .out = "out",
                                     .mean = true,
                                     .meansq = true,
                                     .compute = PERTA_COMPUTE_F32};
    return perta_estimate(&e, &run, record, &err);
}

static int eval(json_t **record)
{
    const struct perta_eval e = {.model = "in/model",
                                 .patch = "in/patch",
                                 .quantize = PERTA_ROUND_FP8,
                                 .data = "in/a.jsonl",
                                 .compute = PERTA_COMPUTE_F32,
                                 .scratch = "out"};
    return perta_eval(&e, &run, record, &err);
}

static int eval_gradient_norm(json_t **record)
{
    const struct perta_eval e = {.model = "in/model",
                                 .data = "in/a.jsonl",
                                 .compute = PERTA_COMPUTE_F32,
                                 .scratch = "out",
                                 .per_sample = true,
                                 .gradient_norm = true};
    return perta_eval(&e, &run, record, &err);
}

static int generate(json_t **record)
{
    const struct perta_eval e = {.model = "in/model",
                                 .data = "in/a.jsonl",
                                 .compute = PERTA_COMPUTE_F32,
                                 .scratch = "out",
                                 .generate = 3};
    return perta_eval(&e, &run, record, &err);
}

static int tune_from(const char *from, json_t **record)
{
    static const char *const targets[] = {"all-linear"};
    const struct perta_tune t = {.model = "in/model",
                                 .data = "in/a.jsonl",
                                 .data_key = "in/key",
                                 .out = "out/adapter",
                                 .adapter = from,
                                 .quantize = from ? PERTA_ROUND_INT4 : PERTA_ROUND_NONE,
                                 .targets = targets,
                                 .n_targets = !from,
                                 .learning_rate = 1e-2,
                                 .steps = 2,
                                 .batch_size = 1,
                                 .compute = PERTA_COMPUTE_F32};
    return perta_tune(&t, &run, record, &err);
}

static int tune(json_t **record)
{
    return tune_from(NULL, record);
}

static int tune_again(json_t **record)
{
    return tune_from("in/lora", record);
}

static int steps_in(const char *tuned, const char *base, double box, json_t **record)
{
    static struct perta_steps s = {.model = "in/model",
                                   .data_forget = "in/a.jsonl",
                                   .data_retain = "in/b.jsonl",
                                   .data_key = "in/key",
                                   .n_steps = 2,
                                   .several = true,
                                   .rule = {0.4, 0.2, 3},
                                   .compute = PERTA_COMPUTE_F32,
                                   .patch = "out/patch"};
    s.stop_forget = s.stop_probability = s.max_retain_rise = (double)INFINITY;
    s.listed[1] = s.listed[2] = true;
    s.tuned = tuned;
    s.base = base;
    s.box = box;
    return perta_steps(&s, &run, record, &err);
}

static int steps(json_t **record)
{
    return steps_in("in/tuned", "in/base", 0, record);
}

static int steps_of_an_adapter(json_t **record)
{
    return steps_in("in/lora", "in/base", 0, record);
}

static int steps_in_a_box(json_t **record)
{
    return steps_in(NULL, NULL, 0.1, record);
}

static int steps_that_last(json_t **record)
{
    const struct perta_steps s = {.model = "in/model",
                                  .data_forget = "in/b.jsonl",
                                  .data_retain = "in/a.jsonl",
                                  .n_steps = 1,
                                  .rule = {0.4, 0.2, 3},
                                  .box = 0.1,
                                  .stop_forget = (double)INFINITY,
                                  .stop_probability = 1e-9,
                                  .survive = 1u << PERTA_AT_INT8 | 1u << PERTA_DROPPED |
                                             1u << PERTA_RETAUGHT,
                                  .reteach = {1, 0.01, 2},
                                  .max_retain_rise = (double)INFINITY,
                                  .compute = PERTA_COMPUTE_F32,
                                  .patch = "out/patch"};
    return perta_steps(&s, &run, record, &err);
}
#endif

static const struct verb {
    const char *name;
    int (*run)(json_t **record);
    uint64_t stride; /* as make check runs it */
    enum way { ANEW, IN_PLACE, GO_ON } way;
} verbs[] = {
    {"unlearn", unlearn, 97, ANEW},
    {"unlearn --one-way", unlearn_one_way, 53, ANEW},
    {"unlearn, an adapter", unlearn_adapter, 53, ANEW},
    {"diff", diff, 53, ANEW},
    {"compose", compose, 41, ANEW},
    {"dequantize", dequantize, 23, ANEW},
    {"apply", apply, 23, ANEW},
    {"revert", revert, 41, ANEW},
    {"apply --in-place", in_place, 5, IN_PLACE},
    {"accumulate", accumulate, 41, ANEW},
    {"manifest", manifest, 7, ANEW},
    {"verify, a manifest", verify_manifest, 7, ANEW},
    {"verify, a forged manifest", verify_forged, 7, ANEW},
    {"verify, a patch", verify_patch, 3, ANEW},
    {"verify, a damaged patch", verify_damaged, 5, ANEW},
    {"verify, a model", verify_model, 3, ANEW},
    {"verify, another model", verify_other, 7, ANEW},
    {"inspect", inspect, 2, ANEW},
    {"unlearn --resume", unlearn, 97, GO_ON},
    {"accumulate --resume", accumulate, 41, GO_ON},
    {"apply --resume", apply, 23, GO_ON},
    {"dequantize --resume", dequantize, 23, GO_ON},
#if HAS_MODEL
    {"estimate --resume", estimate, 29, GO_ON},
    {"tune --resume", tune, 29, GO_ON},
    {"unlearn --steps --resume", steps, 307, GO_ON},
    {"unlearn --steps --box --resume", steps_in_a_box, 307, GO_ON},
    {"unlearn --steps, an adapter, --resume", steps_of_an_adapter, 307, GO_ON},
    {"estimate", estimate, 23, ANEW},
    {"eval", eval, 7, ANEW},
    {"eval --gradient-norm", eval_gradient_norm, 7, ANEW},
    {"eval --generate", generate, 7, ANEW},
    {"tune", tune, 23, ANEW},
    {"tune --adapter", tune_again, 23, ANEW},
    {"unlearn --steps", steps, 307, ANEW},
    {"unlearn --steps, an adapter", steps_of_an_adapter, 307, ANEW},
    {"unlearn --steps --box", steps_in_a_box, 307, ANEW},
    {"unlearn --steps --survive", steps_that_last, 307, ANEW},
#endif
};

/* ---- the content of folders ---- */

static uint64_t tree;

static int add_to_tree(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)at;
    uint8_t *data = alloc((size_t)st->st_size);
    FILE *file = kind == FTW_F ? __real_fopen64(path, "r") : NULL;
    size_t n = file ? fread(data, 1, (size_t)st->st_size, file) : 0;
    if (kind != FTW_D || strstr(path, ".perta-")) /* an empty folder is not an output */
        tree += perta_hash64(path, strlen(path)) ^
                3 * perta_hash64(data, n); /* independent of the order */
    if (file)
        fclose(file);
    free(data);
    return 0;
}

/* A digest of every name and byte in the folder. */
static uint64_t tree_of(const char *folder)
{
    tree = 0;
    __real_nftw64(folder, add_to_tree, 8, FTW_PHYS);
    return tree;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st, (void)kind, (void)at;
    return remove(path);
}

static void begin_anew(enum way way)
{
    __real_nftw64("out", remove_one, 8, FTW_PHYS | FTW_DEPTH);
    if (way != GO_ON)
        ck_assert_int_eq(mkdir("out", 0777), 0);
    if (way != ANEW)
        ck_assert_int_eq(system(way == GO_ON ? "cp -a kept out" : "cp -r in/model out/model"), 0);
    run.resume = way == GO_ON;
    err = (struct perta_err){0};
    give_memory();
}

/* Without values that differ from run to run. */
static char *text_of(json_t *record)
{
    json_object_del(record, "started");
    json_object_del(record, "pieces");
    char *text = record ? json_dumps(record, JSON_SORT_KEYS | JSON_INDENT(1)) : NULL;
    json_decref(record);
    return text;
}

/* ---- each in turn ---- */

struct wanted {
    int rc;
    char *record;
    uint64_t in, before, out;
};

static struct tally {
    uint64_t n, errors, resumed, whole;
} tally;

#define fail_case(...)                                                                      \
    do {                                                                                    \
        fprintf(stderr, "%s, number %llu, %s from %p: ", verb->name, (unsigned long long)n, \
                failed_call, (void *)((char *)failed_caller - &__executable_start));        \
        fprintf(stderr, __VA_ARGS__);                                                       \
        fprintf(stderr, "; %d: %s\n", rc, err.msg);                                         \
        ck_abort();                                                                         \
    } while (0)

static bool is_wanted(const struct wanted *wanted, int rc, const char *record)
{
    return rc == wanted->rc && record && !strcmp(record, wanted->record) &&
           tree_of("out") == wanted->out;
}

/* After an error there is nothing; or it is resumable, and then the run is resumed. In place, the
 * same command completes it. */
static void check_error(const struct verb *verb, const struct wanted *wanted, uint64_t n, int rc)
{
    tally.errors++;
    if (verb->way != IN_PLACE && !err.resumable) {
        if (tree_of("out") != wanted->before)
            fail_case("something is left");
        return;
    }
    json_t *again = NULL;
    run.resume = verb->way != IN_PLACE;
    err = (struct perta_err){0};
    give_memory();
    rc = verb->run(&again);
    char *record = text_of(again);
    bool was_done = verb->way == IN_PLACE && rc == PERTA_ECHECK;
    if ((rc && !was_done) || tree_of("out") != wanted->out)
        fail_case("it cannot be resumed");
    free(record);
    tally.resumed++;
}

static bool try_one(const struct verb *verb, enum short_of what, const struct wanted *wanted,
                    uint64_t n)
{
    json_t *found = NULL;
    begin_anew(verb->way);
    fail_at(what, n);
    int rc = verb->run(&found);
    bool failed = n_asked[what] >= n;
    fail_at(what, 0);
    if (rc == PERTA_ESYS && found)
        fail_case("an error, and a record");
    if (rc == PERTA_ESYS && (err.code != rc || !*err.msg))
        fail_case("an error without a word");
    char *record = text_of(found);
    tally.n += failed;
    if (rc == PERTA_ESYS)
        check_error(verb, wanted, n, rc);
    else if (!is_wanted(wanted, rc, record))
        fail_case("neither an error of the system nor what is right: %s, %s",
                  !record                          ? "no record"
                  : strcmp(record, wanted->record) ? "another record"
                                                   : "its record",
                  tree_of("out") == wanted->out ? "its files" : "other files");
    else
        tally.whole += failed;
    if (tree_of("in") != wanted->in)
        fail_case("an input was touched");
    free(record);
    return failed;
}

/* Count the calls of an undisturbed run. A first run takes the memory that is kept from then on. */
static uint64_t count_calls(const struct verb *verb, enum short_of what)
{
    uint64_t n = 0;
    for (int i = 0; i < 2; i++) {
        json_t *found = NULL;
        begin_anew(ANEW);
        fail_at(what, UINT64_MAX);
        verb->run(&found);
        n = n_asked[what];
        fail_at(what, 0);
        json_decref(found);
    }
    return n;
}

/* Make what an interrupted run leaves, for verbs that resume: half way, or as soon as there is
 * something to resume, which is before the folders are renamed. */
static void make_kept(const struct verb *verb)
{
    uint64_t all = count_calls(verb, MEMORY), n = all / 2;
    for (bool interrupted = false; !interrupted; interrupted = err.resumable, n += 5) {
        json_t *found = NULL;
        ck_assert_uint_lt(n, all);
        begin_anew(ANEW);
        fail_at(MEMORY, n);
        verb->run(&found);
        fail_at(MEMORY, 0);
        json_decref(found);
    }
    ck_assert_int_eq(rename("out", "kept"), 0);
}

static void try_all(const struct verb *verb, enum short_of what)
{
    if (verb->way == GO_ON)
        make_kept(verb);
    struct wanted wanted = {.in = tree_of("in")};
    json_t *found = NULL;
    for (int i = 0; i < 2; i++) { /* the first run takes the memory that is kept from then on */
        begin_anew(verb->way);
        wanted.before = tree_of("out");
        json_decref(found);
        fail_at(what, UINT64_MAX);
        wanted.rc = verb->run(&found);
    }
    uint64_t all = n_asked[what];
    ck_assert_msg(!wanted.rc || wanted.rc == PERTA_ECHECK, "%s: %s", verb->name, err.msg);
    wanted.record = text_of(found);
    wanted.out = tree_of("out");
    tally = (struct tally){0};
    const char *all_of_them = getenv("PERTA_LONG");
    uint64_t stride = all_of_them && *all_of_them ? 1
                      : what == FILES             ? 1 + verb->stride / 8
                                                  : verb->stride;
#ifdef __SANITIZE_ADDRESS__
    stride *= stride > 1 ? 3 : 1;
#endif
    for (uint64_t n = 1; n <= all || stride == 1; n += stride)
        if (!try_one(verb, what, &wanted, n) && stride == 1)
            break;
    fprintf(stderr, "%s: %s: %llu of %llu failed: %llu errors (%llu resumed), %llu whole\n",
            verb->name, what == MEMORY ? "memory" : "files", (unsigned long long)tally.n,
            (unsigned long long)all, (unsigned long long)tally.errors,
            (unsigned long long)tally.resumed, (unsigned long long)tally.whole);
    ck_assert_uint_gt(tally.n, 0);
    free(wanted.record);
}

START_TEST(without_memory_there_is_an_error_or_all_that_is_right)
{
    try_all(&verbs[_i], MEMORY);
}
END_TEST

START_TEST(without_files_there_is_an_error_or_all_that_is_right)
{
    try_all(&verbs[_i], FILES);
}
END_TEST

/* With an argument, only verbs of that name run. */
int main(int argc, char **argv)
{
    int first = 0, n = sizeof verbs / sizeof *verbs;
    for (int i = 0; argc > 1 && i < n; i++)
        if (!strcmp(verbs[i].name, argv[1])) {
            first = i;
            n = i + 1;
        }
    if (!short_of_init())
        return 1;
    TCase *tests = tcase_create("short_memory");
    tcase_add_checked_fixture(tests, enter_inputs, leave);
    tcase_add_loop_test(tests, without_memory_there_is_an_error_or_all_that_is_right, first, n);
    tcase_add_loop_test(tests, without_files_there_is_an_error_or_all_that_is_right, first, n);
    return run_suite("short_memory", tests);
}
