#include "estimators/model/dequantised.h"

#include <string.h>

#include "estimators/model/weights.h"
#include "io/checked.h"

#define PIECE_ELEMS (4ull << 20) /* FP8 at a time */

static uint64_t piece_elems(const struct perta_quant *q)
{
    uint64_t unit = perta_quant_unit(q);
    return unit > 1 ? unit : PIECE_ELEMS;
}

/* ---- on the reader ---- */

static int read_extent(struct perta_weights *w, const struct perta_extent *extent, uint8_t *room,
                       const void **data, struct perta_err *err)
{
    return perta_weights_read(w, &w->files[extent->shard], extent->off_bytes, extent->len_bytes,
                              room, data, err);
}

/* to (n) = elements first.. of a tensor that is quantised. */
static int read_piece(struct perta_dequantised *d, struct perta_weights *w,
                      const struct perta_quant *q, uint64_t first, uint64_t n, uint8_t *to,
                      struct perta_err *err)
{
    struct perta_extent codes, scales;
    const void *of_codes, *of_scales;
    perta_quant_need(q, first, n, &codes, &scales);
    int rc = read_extent(w, &codes, d->source.room, &of_codes, err);
    if (!rc)
        rc = read_extent(w, &scales, d->source.room + d->codes_bytes, &of_scales, err);
    return rc ? rc : perta_quant_form(q, first, n, of_codes, of_scales, to, d->ck, err);
}

static int read_plain(struct perta_weights *w, const struct perta_ref *ref, uint64_t off_bytes,
                      uint64_t len_bytes, uint8_t *to, struct perta_err *err)
{
    const void *data;
    int rc = perta_weights_read(w, &w->files[ref->shard], ref->tensor->off_bytes + off_bytes,
                                len_bytes, to, &data, err);
    if (!rc)
        memmove(to, data, len_bytes);
    return rc;
}

static int read_tensor(struct perta_source *source, struct perta_weights *w,
                       const struct perta_ref *ref, uint64_t off_bytes, uint64_t len_bytes,
                       uint8_t *to, struct perta_err *err)
{
    struct perta_dequantised *d = (struct perta_dequantised *)source;
    const struct perta_quant *q = perta_dequantise_find(d->how, d->ck, ref);
    if (q->coding == PERTA_CODING_NONE)
        return read_plain(w, ref, off_bytes, len_bytes, to, err);
    uint64_t width = perta_dtype_unit_bytes(q->dtype), unit = perta_quant_unit(q);
    uint64_t first = off_bytes / width, n = len_bytes / width, most = piece_elems(q);
    if (n && (first % unit || n % unit))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: MXFP4 can be read in whole matrices only",
                          d->ck->shards[ref->shard].path, ref->tensor->name);
    int rc = 0;
    for (uint64_t at = 0, m; at < n && !rc; at += m) {
        m = n - at < most ? n - at : most;
        rc = read_piece(d, w, q, first + at, m, to + at * width, err);
    }
    return rc;
}

/* ---- open, close ---- */

/* Its files are the model's own. */
static int no_paths(const struct perta_source *source, const char ***paths, size_t *n_paths,
                    struct perta_err *err)
{
    (void)source, (void)paths, (void)n_paths, (void)err;
    return 0;
}

static int open_none(struct perta_source *source, bool direct, struct perta_err *err)
{
    (void)source, (void)direct, (void)err;
    return 0;
}

static int unchanged(const struct perta_source *source, struct perta_err *err)
{
    (void)source, (void)err;
    return 0;
}

static const struct perta_source_ops ops = {no_paths, open_none, read_tensor, unchanged};

/* Bytes of the scales of a piece, wherever it begins. */
static uint64_t scales_most(const struct perta_quant *q, uint64_t n)
{
    struct perta_extent codes, scales;
    if (perta_quant_unit(q) == 1 && q->cols) {
        /* a row more at either end, and as many rows of the grid as of the tensor */
        uint64_t row = q->grid_cols * perta_dtype_unit_bytes(q->scale.dtype), bytes;
        bool fits = !perta_mul_overflows(n / q->cols + 2, row, &bytes);
        return fits && bytes < q->scale.len_bytes ? bytes : q->scale.len_bytes;
    }
    if (!n)
        return 0;
    perta_quant_need(q, 0, n, &codes, &scales);
    return scales.len_bytes;
}

/* Room for the codes, and the scales, of any piece. */
static void measure(struct perta_dequantised *d)
{
    uint64_t codes = 0, scales = 0;
    for (uint64_t i = 0; i < d->ck->n_tensors; i++) {
        const struct perta_ref *ref = &d->ck->by_name[i];
        const struct perta_quant *q = perta_dequantise_find(d->how, d->ck, ref);
        if (q->coding == PERTA_CODING_NONE)
            continue;
        uint64_t n = piece_elems(q) < ref->tensor->n_elems ? piece_elems(q) : ref->tensor->n_elems;
        codes = perta_max(perta_quant_unit(q) > 1 ? n / 2 : n, codes);
        scales = perta_max(scales_most(q, n), scales);
    }
    d->codes_bytes = perta_weights_room(codes);
    d->source.room_bytes = d->codes_bytes + perta_weights_room(scales);
}

int perta_dequantised_open(struct perta_dequantised *d, struct perta_checkpoint *ck,
                           struct perta_err *err)
{
    *d = (struct perta_dequantised){.source.ops = &ops, .ck = ck};
    int rc = perta_dequantise_open(ck, &d->how, err);
    if (!rc && d->how)
        measure(d);
    return rc;
}

void perta_dequantised_close(struct perta_dequantised *d)
{
    perta_dequantise_close(d->how);
    *d = (struct perta_dequantised){0};
}

uint64_t perta_dequantised_stored(const struct perta_dequantised *d, const struct perta_ref *ref)
{
    const struct perta_quant *q = d->how ? perta_dequantise_find(d->how, d->ck, ref) : NULL;
    return !q || q->coding == PERTA_CODING_NONE ? ref->tensor->len_bytes
                                                : q->codes.len_bytes + q->scale.len_bytes;
}
