/* A patch's state at a commit point: saved in the journal, and restored from it. */
#include "stream/patch/patch_out_own.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/text.h"
#include "stream/blob.h"
#include "stream/walk.h"

/* The counts of a tensor; the rest of perta_tensor_counts follows from the checkpoint. */
struct counted {
    uint64_t n_changed, n_rounded_away, n_nonfinite, n_zero_forget, n_zero_retain;
    double sum_weight;
};

/* Counts over the whole patch. */
struct encoded {
    uint64_t n[PERTA_N_ENCODINGS], bytes[PERTA_N_ENCODINGS], units[PERTA_N_ENCODINGS];
    uint64_t weights[PERTA_COUNT_BINS];
};

int perta_patch_out_sync(struct perta_patch_out *p, struct perta_err *err)
{
    int rc = p->shard_open ? perta_writer_sync(&p->writer, err) : 0;
    return rc ? rc : perta_model_out_sync(&p->model, err);
}

/* Save from the first tensor that may have changed: the last one saved before may not have been
 * finished. */
static json_t *save_tensors(struct perta_patch_out *p)
{
    uint64_t first = p->saved_tensors ? p->saved_tensors - 1 : 0, n = p->n_tensors - first;
    struct counted *counted = calloc(n + 1, sizeof *counted);
    for (uint64_t i = 0; counted && i < n; i++) {
        const struct perta_tensor_counts *c = &p->tensors[first + i];
        counted[i] = (struct counted){c->n_changed,     c->n_rounded_away, c->n_nonfinite,
                                      c->n_zero_forget, c->n_zero_retain,  c->sum_weight};
    }
    json_t *json = counted ? json_pack("{s:I, s:o}", "first", (json_int_t)first, "counts",
                                       perta_blob_json(counted, n * sizeof *counted))
                           : NULL;
    free(counted);
    p->saved_tensors = p->n_tensors;
    return json;
}

static json_t *save_entries(struct perta_patch_out *p)
{
    uint64_t first = p->saved_entries;
    p->saved_entries = p->n_entries;
    return json_pack(
        "{s:I, s:o}", "first", (json_int_t)first, "entries",
        perta_blob_json(p->entries + first, (p->n_entries - first) * sizeof *p->entries));
}

json_t *perta_patch_out_save(struct perta_patch_out *p)
{
    struct encoded encoded;
    memcpy(encoded.n, p->n_encoded, sizeof encoded.n);
    memcpy(encoded.bytes, p->encoded_bytes, sizeof encoded.bytes);
    memcpy(encoded.units, p->encoded_units, sizeof encoded.units);
    memcpy(encoded.weights, p->weights, sizeof encoded.weights);
    json_t *finished = json_array();
    for (; p->saved_shards < json_array_size(p->shards); p->saved_shards++)
        perta_json_append(&finished, json_incref(json_array_get(p->shards, p->saved_shards)));
    json_t *state =
        json_pack("{s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "shard", (json_int_t)p->shard,
                  "begun", (json_int_t)p->n_begun, "frames_at", (json_int_t)p->frames_at, "written",
                  (json_int_t)p->written_bytes, "finished", finished, "tensors", save_tensors(p),
                  "entries", save_entries(p), "encoded", perta_blob_json(&encoded, sizeof encoded),
                  "model", perta_model_out_save(&p->model));
    if (p->shard_open)
        perta_json_set(&state, "digest", perta_blob_of_digest(p->writer.digest));
    return state;
}

static uint64_t uint_of(const json_t *json, const char *key)
{
    json_int_t value = json_integer_value(json_object_get(json, key));
    return value < 0 ? UINT64_MAX : (uint64_t)value;
}

/* 0, PERTA_EINPUT if the record is invalid, or PERTA_ESYS when out of memory; as for the functions
 * below. */
static int restore_entries(struct perta_patch_out *p, const json_t *json)
{
    const json_t *blob = json_object_get(json, "entries");
    uint64_t first = uint_of(json, "first"), n = perta_blob_bytes(blob) / sizeof *p->entries;
    if (first > p->n_entries)
        return PERTA_EINPUT;
    if (!perta_patch_out_room(p, first + n))
        return PERTA_ESYS;
    p->n_entries = p->saved_entries = first + n;
    return perta_blob_get(blob, p->entries + first, n * sizeof *p->entries) ? 0 : PERTA_EINPUT;
}

/* Tensors of the shards before this one, plus those begun of it. */
static uint64_t tensors_until(const struct perta_patch_out *p, uint32_t shard, uint64_t begun)
{
    uint64_t n = begun;
    for (uint32_t s = 0; s < shard; s++)
        n += p->after->shards[s].header->n_tensors;
    return n;
}

static int restore_tensors(struct perta_patch_out *p, const json_t *json, uint64_t n_tensors)
{
    const json_t *blob = json_object_get(json, "counts");
    struct counted *counted = malloc(perta_blob_bytes(blob) + 1);
    uint64_t first = uint_of(json, "first"), n = perta_blob_bytes(blob) / sizeof *counted;
    if (!counted)
        return PERTA_ESYS;
    bool good = first <= p->saved_tensors && n <= n_tensors && first == n_tensors - n &&
                perta_blob_get(blob, counted, n * sizeof *counted);
    for (uint64_t i = 0; good && i < n; i++) {
        struct perta_tensor_counts *c = &p->tensors[first + i];
        c->n_changed = counted[i].n_changed;
        c->n_rounded_away = counted[i].n_rounded_away;
        c->n_zero_forget = counted[i].n_zero_forget;
        c->n_zero_retain = counted[i].n_zero_retain;
        c->n_nonfinite = counted[i].n_nonfinite;
        c->sum_weight = counted[i].sum_weight;
    }
    free(counted);
    p->saved_tensors = n_tensors;
    return good ? 0 : PERTA_EINPUT;
}

/* Set again what begin_tensors() set. */
static void name_tensors(struct perta_patch_out *p)
{
    uint64_t i = 0;
    for (uint32_t s = 0; s < p->after->n_shards; s++)
        for (uint64_t t = 0; t < p->after->shards[s].header->n_tensors && i < p->n_tensors;
             t++, i++) {
            p->tensors[i].name = p->after->shards[s].header->tensors[t].name;
            p->tensors[i].action = p->actions[i];
            p->tensors[i].n_params = p->after->shards[s].header->tensors[t].n_elems;
        }
}

static int restore(struct perta_patch_out *p, const json_t *state)
{
    uint64_t shard = uint_of(state, "shard"), begun = uint_of(state, "begun");
    const json_t *digest = json_object_get(state, "digest");
    const json_t *finished = json_object_get(state, "finished");
    struct encoded encoded;
    bool open = digest != NULL;
    uint64_t most =
        open && shard < p->after->n_shards ? p->after->shards[shard].header->n_tensors : 0;
    begun = open ? begun : 0;
    if (shard >= p->after->n_shards + !open || begun > most || !json_is_array(finished) ||
        !perta_blob_get(json_object_get(state, "encoded"), &encoded, sizeof encoded))
        return PERTA_EINPUT;
    perta_json_extend(&p->shards, finished);
    if (!p->shards)
        return PERTA_ESYS;
    if (shard != p->shard)
        p->n_entries = 0;
    p->shard = (uint32_t)shard;
    p->shard_open = open;
    p->n_begun = begun;
    p->frames_at = uint_of(state, "frames_at");
    p->written_bytes = uint_of(state, "written");
    p->saved_shards = json_array_size(p->shards);
    p->n_tensors = tensors_until(p, p->shard, begun);
    memcpy(p->n_encoded, encoded.n, sizeof encoded.n);
    memcpy(p->encoded_bytes, encoded.bytes, sizeof encoded.bytes);
    memcpy(p->encoded_units, encoded.units, sizeof encoded.units);
    memcpy(p->weights, encoded.weights, sizeof encoded.weights);
    perta_digest_free(p->digest);
    p->digest = open ? perta_digest_new(true) : NULL;
    if (open && !p->digest)
        return PERTA_ESYS;
    int rc = !open || perta_blob_get_digest(digest, p->digest) ? 0 : PERTA_EINPUT;
    if (!rc)
        rc = restore_tensors(p, json_object_get(state, "tensors"), p->n_tensors);
    return rc ? rc : restore_entries(p, json_object_get(state, "entries"));
}

int perta_patch_out_restore(struct perta_patch_out *p, const json_t *state, struct perta_err *err)
{
    int rc = restore(p, state);
    if (rc)
        return rc == PERTA_ESYS
                   ? perta_fail_sys(err, ENOMEM, "journal")
                   : perta_fail(err, PERTA_EINPUT, "a record has an invalid state of a patch");
    return perta_model_out_restore(&p->model, json_object_get(state, "model"), err);
}

/* Are the entries those of all chunks up to that unit, and do their frames make up the file? */
static bool covers(const struct perta_patch_out *p, uint64_t tensor, uint64_t unit)
{
    const struct perta_header *header = p->after->shards[p->shard].header;
    uint64_t i = 0, at = perta_patch_head_bytes(p->before->shards[p->shard].header, header);
    for (uint64_t t = 0; t <= tensor; t++) {
        uint64_t width = perta_dtype_unit_bytes(header->tensors[t].dtype);
        uint64_t units = t < tensor ? header->tensors[t].len_bytes / width : unit;
        for (uint64_t first = 0; first < units; first += PERTA_CHUNK_ELEMS, i++) {
            uint64_t left = units - first;
            const struct perta_patch_entry *e = &p->entries[i];
            if (i == p->n_entries || e->tensor != t || e->encoding < 0 ||
                e->encoding >= PERTA_N_ENCODINGS ||
                e->n_units != (left < PERTA_CHUNK_ELEMS ? left : PERTA_CHUNK_ELEMS) ||
                e->frame_off != (e->encoding == PERTA_ENC_ZERO ? 0 : at))
                return false;
            at += e->frame_bytes;
        }
    }
    return i == p->n_entries && at == p->frames_at && at == perta_digest_bytes(p->digest);
}

int perta_patch_out_reopen(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                           uint64_t unit, struct perta_err *err)
{
    name_tensors(p);
    if (!p->shard_open || p->shard != shard || p->n_begun != tensor + 1 ||
        json_array_size(p->shards) != shard || !covers(p, tensor, unit))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: its records do not agree on one place; --force "
                          "starts over",
                          p->folder.partial);
    const struct perta_shard *to = &p->after->shards[shard];
    const struct perta_tensor *t = &to->header->tensors[tensor];
    char *name = perta_patch_out_name(to->name);
    char *path = name ? perta_publish_path(&p->folder, name) : NULL;
    int rc = path ? perta_writer_reopen(&p->writer, p->engine, path, p->digest, p->writer_bufs, err)
                  : perta_fail_sys(err, ENOMEM, "%s", to->name);
    if (path)
        p->digest = NULL; /* the writer owns it now */
    free(name);
    free(path);
    uint64_t at = t->off_bytes + unit * perta_dtype_unit_bytes(t->dtype);
    return rc ? rc : perta_model_out_reopen(&p->model, shard, to->name, at, err);
}
