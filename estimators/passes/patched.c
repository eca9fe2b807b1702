#include "estimators/passes/patched.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/model/weights.h"
#include "io/checked.h"
#include "stream/walk.h"

/* ---- a chunk ---- */

static uint8_t *frame_room(const struct perta_patched *p)
{
    return p->source.room + perta_weights_room(p->chunk_bytes);
}

static uint8_t *after_room(const struct perta_patched *p)
{
    return frame_room(p) + perta_weights_room(p->frame_bytes);
}

static int move(struct perta_patched *p, struct perta_weights *w,
                struct perta_patch_in_shard *shard, const struct perta_patch_entry *entry,
                const char *path, uint64_t unit, const void *before, struct perta_err *err)
{
    const void *frame;
    uint8_t *after = after_room(p);
    int rc = perta_weights_read(w, &shard->file, entry->frame_off, entry->frame_bytes,
                                frame_room(p), &frame, err);
    if (!rc)
        rc = perta_patch_in_lead(shard, entry, true, p->codec, frame, path, unit, before, after,
                                 err);
    p->after = after;
    return rc;
}

/* Set p->after to chunk number k of a tensor, after the patch. */
static int take_chunk(struct perta_patched *p, struct perta_weights *w, const struct perta_ref *ref,
                      uint64_t k, struct perta_err *err)
{
    struct perta_patch_in_shard *shard = &p->patch.shards[ref->shard];
    const struct perta_header *header = w->ck->shards[ref->shard].header;
    uint64_t first = p->starts[ref->shard][ref->tensor - header->tensors];
    const struct perta_patch_entry *entry = &shard->patch->entries[first + k];
    if (entry == p->entry)
        return 0;
    p->entry = NULL;
    uint64_t unit = k * PERTA_CHUNK_ELEMS;
    uint64_t off = unit * perta_dtype_unit_bytes(ref->tensor->dtype);
    uint64_t len = perta_patch_in_chunk_bytes(shard, entry);
    const void *before;
    int rc = perta_weights_read(w, &w->files[ref->shard], ref->tensor->off_bytes + off, len,
                                p->source.room, &before, err);
    if (rc)
        return rc;
    const char *path = w->files[ref->shard].path;
    p->after = before;
    rc = entry->encoding == PERTA_ENC_ZERO ? perta_patch_in_lead(shard, entry, true, p->codec, NULL,
                                                                 path, unit, before, NULL, err)
                                           : move(p, w, shard, entry, path, unit, before, err);
    p->entry = rc ? NULL : entry;
    return rc;
}

static int read_patched(struct perta_source *source, struct perta_weights *w,
                        const struct perta_ref *ref, uint64_t off_bytes, uint64_t len_bytes,
                        uint8_t *to, struct perta_err *err)
{
    struct perta_patched *p = (struct perta_patched *)source;
    uint64_t whole = PERTA_CHUNK_ELEMS * (uint64_t)perta_dtype_unit_bytes(ref->tensor->dtype);
    uint64_t end = off_bytes + len_bytes;
    for (uint64_t at = off_bytes; at < end;) {
        uint64_t k = at / whole, within = at - k * whole;
        uint64_t n = end - at < whole - within ? end - at : whole - within;
        int rc = take_chunk(p, w, ref, k, err);
        if (rc)
            return rc;
        memcpy(to + (at - off_bytes), p->after + within, n);
        at += n;
    }
    return 0;
}

/* ---- open, close ---- */

static int paths(const struct perta_source *source, const char ***list, size_t *n,
                 struct perta_err *err)
{
    return perta_patch_in_paths(&((const struct perta_patched *)source)->patch, list, n, err);
}

static int open_files(struct perta_source *source, bool direct, struct perta_err *err)
{
    return perta_patch_in_open_files(&((struct perta_patched *)source)->patch, direct, err);
}

static int unchanged(const struct perta_source *source, struct perta_err *err)
{
    return perta_patch_in_unchanged(&((const struct perta_patched *)source)->patch, err);
}

static const struct perta_source_ops ops = {paths, open_files, read_patched, unchanged};

static void measure(struct perta_patched *p, const struct perta_checkpoint *ck)
{
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        uint64_t bytes = perta_walk_chunk_bytes(ck->by_name[i].tensor);
        p->chunk_bytes = bytes > p->chunk_bytes ? bytes : p->chunk_bytes;
    }
    for (uint32_t s = 0; s < p->patch.n_shards; s++) {
        const struct perta_patch *patch = p->patch.shards[s].patch;
        for (uint64_t e = 0; e < patch->n_entries; e++)
            if (patch->entries[e].frame_bytes > p->frame_bytes)
                p->frame_bytes = patch->entries[e].frame_bytes;
    }
    p->source.room_bytes = perta_weights_room(p->chunk_bytes) + perta_weights_room(p->frame_bytes) +
                           perta_align_up(p->chunk_bytes, PERTA_BLOCK_BYTES);
    p->source.heap_bytes = perta_codec_bytes(p->chunk_bytes);
}

static int find_starts(struct perta_patched *p, const struct perta_checkpoint *ck,
                       struct perta_err *err)
{
    int rc = 0;
    p->starts = calloc(ck->n_shards + 1, sizeof *p->starts);
    if (!p->starts)
        return perta_fail_sys(err, ENOMEM, "%s", p->patch.path);
    for (uint32_t s = 0; s < ck->n_shards && !rc; s++) {
        const struct perta_header *header = ck->shards[s].header;
        p->starts[s] = calloc(header->n_tensors + 1, sizeof **p->starts);
        rc = p->starts[s] ? perta_patch_in_starts(&p->patch.shards[s], header, p->starts[s], err)
                          : perta_fail_sys(err, ENOMEM, "%s", p->patch.path);
    }
    return rc;
}

int perta_patched_open(struct perta_patched *p, const char *path, const struct perta_checkpoint *ck,
                       struct perta_err *err)
{
    *p = (struct perta_patched){.source = {.ops = &ops}};
    int rc = perta_patch_in_open(&p->patch, path, err);
    if (!rc)
        rc = perta_patch_in_check_model(&p->patch, ck, true, err);
    if (!rc)
        rc = find_starts(p, ck, err);
    if (rc)
        return rc;
    measure(p, ck);
    p->codec = perta_codec_new(p->chunk_bytes);
    return p->codec ? 0 : perta_fail_sys(err, ENOMEM, "%s", path);
}

void perta_patched_close(struct perta_patched *p)
{
    for (uint32_t s = 0; p->starts && s < p->patch.n_shards; s++)
        free(p->starts[s]);
    free(p->starts);
    perta_codec_free(p->codec);
    perta_patch_in_close(&p->patch);
    *p = (struct perta_patched){0};
}
