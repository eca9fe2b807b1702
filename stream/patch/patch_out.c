#include "stream/patch/patch_out_own.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/format/canonical.h"
#include "io/text.h"
#include "stream/walk.h"

static const char *const encoding_names[PERTA_N_ENCODINGS] = {"zero", "delta", "values"};

int perta_patch_out_begin(struct perta_patch_out *p, const char *path, const char *out,
                          const char *like, const struct perta_journal *journal, bool force,
                          struct perta_err *err)
{
    *p = (struct perta_patch_out){.shards = json_array()};
    int rc = perta_model_out_begin(&p->model, out, like, journal, force, err);
    return rc ? rc : perta_journal_folder(journal, &p->folder, path, NULL, force, err);
}

/* Memory of a journal's record for each tensor, as text and as tree, and the most tensors in a
 * record. */
#define RECORD_BYTES 500u
#define RECORD_TENSORS 65536u

static uint64_t count_chunks(const struct perta_header *header)
{
    uint64_t n = 0;
    for (uint64_t t = 0; t < header->n_tensors; t++) {
        uint64_t chunk = perta_walk_chunk_bytes(&header->tensors[t]);
        n += chunk ? (header->tensors[t].len_bytes + chunk - 1) / chunk : 0;
    }
    return n;
}

uint64_t perta_patch_out_memory(const struct perta_checkpoint *before,
                                const struct perta_checkpoint *after)
{
    uint64_t most = 0, n = after->n_tensors < RECORD_TENSORS ? after->n_tensors : RECORD_TENSORS;
    for (uint32_t s = 0; s < after->n_shards; s++) {
        /* Entries, and the table or the head that is built for the file. */
        uint64_t bytes =
            2 * count_chunks(after->shards[s].header) * sizeof(struct perta_patch_entry) +
            perta_patch_head_bytes(before->shards[s].header, after->shards[s].header);
        most = perta_max(bytes, most);
    }
    return after->n_tensors * sizeof(struct perta_tensor_counts) + most + n * RECORD_BYTES;
}

bool perta_patch_out_is_due(const struct perta_patch_out *p)
{
    return p->n_tensors - p->saved_tensors >= RECORD_TENSORS;
}

int perta_patch_out_attach(struct perta_patch_out *p, const struct perta_checkpoint *before,
                           const struct perta_checkpoint *after, const char *const *actions,
                           struct perta_engine *engine, struct perta_writer_bufs patch_bufs,
                           struct perta_writer_bufs model_bufs, struct perta_err *err)
{
    p->before = before;
    p->after = after;
    p->actions = actions;
    p->engine = engine;
    p->writer_bufs = patch_bufs;
    p->model.engine = engine;
    p->model.writer_bufs = model_bufs;
    p->tensors = calloc(after->n_tensors + 1, sizeof *p->tensors);
    return p->tensors ? 0 : perta_fail_sys(err, ENOMEM, "counts");
}

char *perta_patch_out_name(const char *shard)
{
    char *name = malloc(strlen(shard) + sizeof PERTA_PATCH_SUFFIX);
    if (name)
        strcat(strcpy(name, shard), PERTA_PATCH_SUFFIX);
    return name;
}

static int open_patch_file(struct perta_patch_out *p, const char *shard, struct perta_err *err)
{
    char *name = perta_patch_out_name(shard);
    char *path = name ? perta_publish_path(&p->folder, name) : NULL;
    int rc = path ? perta_publish_clear(&p->folder, name, err)
                  : perta_fail_sys(err, ENOMEM, "%s", shard);
    if (!rc)
        rc = perta_writer_open(&p->writer, p->engine, path, 0, p->writer_bufs, err);
    free(name);
    free(path);
    return rc;
}

bool perta_patch_out_room(struct perta_patch_out *p, uint64_t least)
{
    uint64_t n =
        p->shard < p->after->n_shards ? count_chunks(p->after->shards[p->shard].header) : 0;
    n = n > least ? n : least ? least : 1;
    if (n <= p->entries_max)
        return true;
    void *grown = realloc(p->entries, n * sizeof *p->entries);
    if (grown) {
        p->entries = grown;
        p->entries_max = n;
    }
    return grown;
}

static int begin_shard(struct perta_patch_out *p, struct perta_err *err)
{
    const struct perta_shard *to = &p->after->shards[p->shard];
    uint8_t *head = NULL;
    uint64_t head_bytes = 0;
    int rc = perta_patch_out_room(p, 0) ? open_patch_file(p, to->name, err)
                                        : perta_fail_sys(err, ENOMEM, "patch table");
    if (!rc)
        rc = perta_patch_head_build(p->before->shards[p->shard].header, to->header, &head,
                                    &head_bytes, err);
    if (!rc)
        rc = perta_writer_append(&p->writer, head, head_bytes, err);
    free(head);
    if (rc)
        return rc;
    p->n_entries = p->saved_entries = 0;
    p->n_begun = 0;
    p->frames_at = head_bytes;
    p->shard_open = true;
    return perta_model_out_shard(&p->model, to->name, to->header->bytes, to->header->len_bytes,
                                 to->header->file_len_bytes, err);
}

static int end_shard(struct perta_patch_out *p, struct perta_err *err)
{
    const char *name = p->after->shards[p->shard].name;
    uint8_t *table = NULL;
    uint64_t table_bytes = 0;
    struct perta_digest_hex hex;
    int rc = perta_patch_table_build(p->entries, p->n_entries, &table, &table_bytes, err);
    if (!rc)
        rc = perta_writer_append(&p->writer, table, table_bytes, err);
    if (!rc)
        rc = perta_writer_close(&p->writer, &hex, err);
    free(table);
    if (rc)
        return rc;
    p->written_bytes += hex.len_bytes;
    char *file = perta_patch_out_name(name);
    perta_json_append(&p->shards, json_pack("{s:s, s:I, s:s, s:s}", "name", file, "bytes",
                                            (json_int_t)hex.len_bytes, "xxh3_128", hex.xxh128,
                                            "sha256", hex.sha256));
    free(file);
    if (!p->shards)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    p->shard++;
    p->shard_open = false;
    return perta_model_out_shard_end(&p->model, name, err);
}

static void begin_tensors(struct perta_patch_out *p, uint64_t n_wanted)
{
    const struct perta_header *header = p->after->shards[p->shard].header;
    for (; p->n_begun < n_wanted; p->n_begun++, p->n_tensors++)
        p->tensors[p->n_tensors] = (struct perta_tensor_counts){
            .name = header->tensors[p->n_begun].name,
            .action = p->actions[p->n_tensors],
            .n_params = header->tensors[p->n_begun].n_elems,
        };
}

int perta_patch_out_reach(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                          struct perta_err *err)
{
    for (;;) {
        if (p->shard == p->after->n_shards)
            return 0;
        int rc = p->shard_open ? 0 : begin_shard(p, err);
        if (rc)
            return rc;
        if (p->shard == shard) {
            begin_tensors(p, tensor + 1);
            return 0;
        }
        begin_tensors(p, p->after->shards[p->shard].header->n_tensors);
        rc = end_shard(p, err);
        if (rc)
            return rc;
    }
}

struct perta_tensor_counts *perta_patch_out_counts(struct perta_patch_out *p)
{
    return &p->tensors[p->n_tensors - 1];
}

static void add_entry(struct perta_patch_out *p, const struct perta_patch_entry *entry)
{
    assert(p->n_entries < p->entries_max);
    p->entries[p->n_entries++] = *entry;
}

int perta_patch_out_chunk(struct perta_patch_out *p, const struct perta_chunk_out *chunk,
                          struct perta_err *err)
{
    const struct perta_coded *coded = &chunk->coded;
    struct perta_patch_entry entry = {
        .frame_off = coded->encoding == PERTA_ENC_ZERO ? 0 : p->frames_at,
        .frame_bytes = coded->frame_bytes,
        .payload_bytes = coded->payload_bytes,
        .tensor = (uint32_t)(p->n_begun - 1),
        .n_units = chunk->n_units,
        .encoding = coded->encoding,
        .hash_before = chunk->hash_before,
        .hash_after = chunk->hash_after,
    };
    p->frames_at += coded->frame_bytes;
    p->n_encoded[coded->encoding]++;
    p->encoded_bytes[coded->encoding] += coded->frame_bytes;
    p->encoded_units[coded->encoding] += chunk->n_units;
    perta_patch_out_counts(p)->n_changed += coded->n_changed;
    add_entry(p, &entry);
    int rc = perta_writer_append(&p->writer, chunk->frame, coded->frame_bytes, err);
    if (!rc)
        rc = perta_model_out_append(&p->model, chunk->after, chunk->after_bytes, err);
    return rc;
}

static void set_count(json_t **json, const char *key, uint64_t n)
{
    perta_json_set(json, key, json_integer((json_int_t)n));
}

/* The counts of a tensor. A one-way patch withholds all that the model after does not show anyway:
 * mean weights and the like are computed from values that it withholds, and for a tensor of one
 * element, together with base and tuned, they would reveal the old value. */
static json_t *counts_json(const struct perta_tensor_counts *c, bool withholds)
{
    uint64_t weighed = c->n_params - c->n_nonfinite;
    json_t *json = json_object();
    perta_json_set(&json, "name", json_string(c->name));
    perta_json_set(&json, "action", json_string(c->action));
    set_count(&json, "parameters", c->n_params);
    set_count(&json, "changed", c->n_changed);
    if (withholds)
        return json;
    set_count(&json, "rounded_away", c->n_rounded_away);
    set_count(&json, "nonfinite", c->n_nonfinite);
    if (!strcmp(c->action, "edited")) {
        perta_json_set(&json, "mean_weight",
                       json_real(weighed ? c->sum_weight / (double)weighed : 0));
        set_count(&json, "zero_forget", c->n_zero_forget);
        set_count(&json, "zero_retain", c->n_zero_retain);
    }
    return json;
}

static json_t *row(const void *patch_out, uint64_t i)
{
    const struct perta_patch_out *p = patch_out;
    return counts_json(&p->tensors[i], p->one_way);
}

static struct perta_tensor_counts total_of(const struct perta_patch_out *p)
{
    struct perta_tensor_counts total = {.action = "edited"};
    uint64_t edited_nonfinite = 0, edited = 0;
    for (uint64_t i = 0; i < p->n_tensors; i++) {
        const struct perta_tensor_counts *c = &p->tensors[i];
        total.n_params += c->n_params;
        total.n_changed += c->n_changed;
        total.n_rounded_away += c->n_rounded_away;
        total.n_nonfinite += c->n_nonfinite;
        total.sum_weight += c->sum_weight;
        if (!strcmp(c->action, "edited")) {
            edited += c->n_params;
            edited_nonfinite += c->n_nonfinite;
        }
    }
    /* The mean is over the parameters that were weighed. */
    uint64_t weighed = edited - edited_nonfinite;
    total.sum_weight = weighed ? total.sum_weight / (double)weighed : 0;
    return total;
}

static json_t *total_json(const struct perta_patch_out *p, const struct perta_tensor_counts *total)
{
    json_t *json =
        json_pack("{s:I, s:I, s:I, s:I, s:f}", "parameters", (json_int_t)total->n_params, "changed",
                  (json_int_t)total->n_changed, "rounded_away", (json_int_t)total->n_rounded_away,
                  "nonfinite", (json_int_t)total->n_nonfinite, "mean_weight", total->sum_weight);
    json_t *weights = json_array();
    uint64_t n = 0;
    for (int i = 0; i < PERTA_COUNT_BINS; i++) {
        perta_json_append(&weights, json_integer((json_int_t)p->weights[i]));
        n += p->weights[i];
    }
    if (n)
        perta_json_set(&json, "weights", json_incref(weights));
    json_decref(weights);
    return json;
}

static json_t *encodings_json(const struct perta_patch_out *p)
{
    json_t *json = json_object();
    for (int i = 0; i < PERTA_N_ENCODINGS; i++)
        perta_json_set(&json, encoding_names[i],
                       json_pack("{s:I, s:I, s:I}", "chunks", (json_int_t)p->n_encoded[i],
                                 "elements", (json_int_t)p->encoded_units[i], "bytes",
                                 (json_int_t)p->encoded_bytes[i]));
    return json;
}

int perta_patch_out_encode(bool one_way, struct perta_codec *codec, enum perta_dtype dtype,
                           const void *before, const void *after, uint64_t n_bytes, uint8_t *dst,
                           uint64_t dst_capacity, struct perta_coded *coded, uint64_t *hash_before,
                           struct perta_err *err)
{
    return one_way ? perta_codec_encode_values(codec, dtype, before, after, n_bytes, dst,
                                               dst_capacity, coded, hash_before, err)
                   : perta_codec_encode(codec, dtype, before, after, n_bytes, dst, dst_capacity,
                                        coded, err);
}

/* The inputs without digests, for a one-way patch: where an edit may change only few values, a
 * digest would confirm a guess. The caller's. */
static json_t *without_digests(const json_t *inputs)
{
    json_t *copy = json_deep_copy(inputs), *input, *shard;
    const char *role;
    size_t i;
    json_object_foreach (copy, role, input)
        json_array_foreach (json_object_get(input, "shards"), i, shard)
            json_object_set_new(shard, "xxh3_128", json_null()); /* is there: takes no memory */
    return copy;
}

/* The total counts that a one-way patch shows. The caller's. */
static json_t *public_counts(const json_t *counts)
{
    return json_pack("{s:O, s:O}", "parameters", json_object_get(counts, "parameters"), "changed",
                     json_object_get(counts, "changed"));
}

struct manifest {
    json_t *json; /* without its tensors */
    const struct perta_patch_out *p;
};

static bool print_manifest(FILE *to, void *ctx)
{
    const struct manifest *m = ctx;
    const struct perta_canonical_rows rows = {
        .key = "tensors", .n = m->p->n_tensors, .row = row, .ctx = m->p};
    return perta_canonical_print(to, m->json, &rows);
}

static int write_manifest(struct perta_patch_out *p, json_t *recipe, json_t *inputs, json_t *counts,
                          struct perta_err *err)
{
    struct manifest m = {.p = p};
    m.json = json_pack("{s:s, s:i, s:s, s:O, s:o, s:{s:O, s:O}, s:o, s:n, s:o, s:{s:s, s:s}}",
                       "format", "perta-patch", "version", PERTA_PATCH_VERSION, "tool",
                       "perta " PERTA_VERSION, "recipe", recipe, "inputs",
                       p->one_way ? without_digests(inputs) : json_incref(inputs), "outputs",
                       "patch", p->shards, "model", p->model.shards, "counts",
                       p->one_way ? public_counts(counts) : json_incref(counts), "tensors",
                       "encodings", encodings_json(p), "digests", "sha256",
                       "proves that a file is this one", "xxh3_128", "finds damage, not forgery");
    int rc = m.json ? perta_publish_print(&p->folder, "manifest.json", print_manifest, &m, err)
                    : perta_fail_sys(err, ENOMEM, "manifest.json");
    json_decref(m.json);
    return rc;
}

int perta_patch_out_finish(struct perta_patch_out *p, json_t *recipe, json_t *inputs,
                           const struct perta_checkpoint *from, json_t **summary,
                           struct perta_err *err)
{
    int rc = perta_patch_out_reach(p, p->after->n_shards, 0, err);
    if (rc)
        return rc;
    struct perta_tensor_counts total = total_of(p);
    json_t *counts = total_json(p, &total);
    json_t *skipped = json_array();
    rc = write_manifest(p, recipe, inputs, counts, err);
    if (!rc)
        rc = perta_model_out_copy_rest(&p->model, from, &skipped, err);
    if (!rc)
        *summary =
            json_pack("{s:o, s:O, s:o, s:I, s:I, s:O}", "patch",
                      perta_text_json("%s", p->folder.path), "counts", counts, "encodings",
                      encodings_json(p), "patch_bytes", (json_int_t)p->written_bytes, "model_bytes",
                      (json_int_t)p->model.written_bytes, "left_behind", skipped);
    json_decref(counts);
    json_decref(skipped);
    return rc || *summary ? rc : perta_fail_sys(err, ENOMEM, "%s", p->folder.path);
}

void perta_patch_out_release(struct perta_patch_out *p)
{
    perta_writer_abort(&p->writer);
    perta_model_out_release(&p->model);
    perta_publish_release(&p->folder);
    perta_digest_free(p->digest);
    json_decref(p->shards);
    free(p->entries);
    free(p->tensors);
    *p = (struct perta_patch_out){0};
}
