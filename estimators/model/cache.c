#include "estimators/model/cache.h"

#include <errno.h>
#include <stdlib.h>

/* Of sequences whose keys and values are read from a file, about as many are read at once. */
#define ROOM_BYTES (4ull << 20)

static void attend(struct perta_past_tokens *past, const struct perta_layer *layer,
                   const struct perta_batch *batch, const struct perta_acts *acts);

/* ---- memory ---- */

/* Floats of a key, or of a value. */
static size_t width_of(const struct perta_cache *c)
{
    return (size_t)c->llm->n_kv_heads * c->llm->head_dim;
}

int perta_cache_plan(struct perta_cache *c, const struct perta_llm *llm, struct perta_cached *of,
                     uint64_t n, struct perta_err *err)
{
    *c = (struct perta_cache){.past.attend = attend, .llm = llm, .of = of, .n = n};
    c->pasts = calloc(n, sizeof *c->pasts);
    c->kept = calloc(llm->n_layers, sizeof *c->kept);
    for (uint64_t i = 0; i < n; i++) {
        of[i].row = c->n_rows;
        c->n_rows += 2 * (uint64_t)of[i].most;
        c->longest = of[i].most > c->longest ? of[i].most : c->longest;
    }
    return c->pasts && c->kept ? 0 : perta_fail_sys(err, ENOMEM, "keys and values");
}

uint64_t perta_cache_room_bytes(const struct perta_cache *c)
{
    uint64_t one = 2 * (uint64_t)c->longest * width_of(c) * sizeof(float);
    uint64_t all = c->n_rows * width_of(c) * sizeof(float);
    uint64_t room = one > ROOM_BYTES ? one : ROOM_BYTES;
    return room < all ? room : all;
}

uint64_t perta_cache_heap_bytes(const struct perta_cache *c)
{
    return c->n * (sizeof *c->of + sizeof *c->pasts) + c->llm->n_layers * sizeof *c->kept;
}

int perta_cache_open(struct perta_cache *c, struct perta_scratch *scratch, struct perta_err *err)
{
    c->be = scratch->be;
    int rc = c->be->ops->alloc(c->be, perta_cache_room_bytes(c), &c->room, err);
    for (uint32_t l = 0; l < c->llm->n_layers && !rc; l++)
        rc = perta_store_open(&c->kept[l], scratch, NULL, c->n_rows, width_of(c), err);
    return rc;
}

void perta_cache_close(struct perta_cache *c, struct perta_scratch *scratch)
{
    for (uint32_t l = 0; c->kept && scratch && l < c->llm->n_layers; l++)
        perta_store_close(&c->kept[l], scratch);
    if (c->be)
        c->be->ops->free(c->be, c->room);
    free(c->kept);
    free(c->pasts);
    free(c->of);
    *c = (struct perta_cache){0};
}

/* ---- keep ---- */

/* Write n keys and values (n, width) of a sequence, from its token at on. */
static int put(struct perta_cache *c, uint32_t layer, const struct perta_cached *of, uint32_t at,
               uint32_t n, struct perta_array k, struct perta_array v, struct perta_err *err)
{
    int rc = perta_store_set(&c->kept[layer], of->row + at, n, k, err);
    return rc ? rc : perta_store_set(&c->kept[layer], of->row + of->most + at, n, v, err);
}

int perta_cache_keep(struct perta_cache *c, uint32_t layer, const struct perta_batch *batch,
                     const struct perta_acts *acts, struct perta_err *err)
{
    int rc = 0;
    for (uint64_t i = 0; i < c->n && !rc; i++) {
        const struct perta_cached *of = &c->of[i];
        uint64_t at = (of->first - batch->first) * width_of(c);
        if (of->first >= batch->first && of->first < batch->first + batch->n)
            rc = put(c, layer, of, 0, of->n, perta_array_at(acts->k, at),
                     perta_array_at(acts->v, at), err);
    }
    return rc;
}

void perta_cache_added(struct perta_cache *c, size_t n)
{
    for (size_t i = 0; i < n; i++)
        c->of[c->continues[i]].n++;
}

/* ---- attend ---- */

/* The first of n tokens that the last of them sees. */
static uint32_t first_seen(uint32_t n, uint32_t window)
{
    return n > window ? n - window : 0;
}

/* Where the keys and values are that token i of the batch sees: in the store, if it is in memory;
 * otherwise they are read to the room, from row *row on, which moves past them. Returns 1 if they
 * do not fit. */
static int find(struct perta_cache *c, const struct perta_layer *l, size_t token, size_t *row,
                struct perta_past *past, struct perta_err *err)
{
    const struct perta_cached *of = &c->of[c->continues[token]];
    const struct perta_store *kept = &c->kept[l->site.layer];
    struct perta_array room = {c->room, 0};
    uint32_t from = first_seen(of->n + 1, perta_llm_window(l->llm, l->site.layer));
    uint64_t keys = of->row + from, values = keys + of->most, W = width_of(c);
    size_t n = of->n + 1 - from;
    *past = (struct perta_past){keys, values, n};
    if (kept->buffer)
        return 0;
    if ((*row + 2 * n) * W * sizeof(float) > perta_cache_room_bytes(c))
        return 1;
    *past = (struct perta_past){*row, *row + n, n};
    *row += 2 * n;
    int rc = perta_store_load(kept, keys, n, perta_array_at(room, past->keys * W), err);
    return rc ? rc : perta_store_load(kept, values, n, perta_array_at(room, past->values * W), err);
}

/* Attention of the tokens of a batch from first on, as many as there is room for; first moves past
 * them. */
static int attend_some(struct perta_cache *c, const struct perta_layer *l,
                       const struct perta_batch *batch, const struct perta_acts *a, size_t *first,
                       struct perta_err *err)
{
    size_t n = 0, row = 0, at = *first * l->llm->n_heads * l->llm->head_dim;
    uint32_t buffer = c->kept[l->site.layer].buffer;
    struct perta_past *pasts = c->pasts + *first;
    int rc = 0;
    while (*first + n < batch->n && !rc) {
        rc = find(c, l, batch->first + *first + n, &row, &pasts[n], err);
        n += !rc;
    }
    if (rc < 0)
        return rc;
    const struct perta_attention_past attention = {pasts, n, l->llm->n_heads, l->llm->n_kv_heads,
                                                   l->llm->head_dim};
    l->be->ops->attention_past_forward(l->be, &attention, perta_array_at(a->att, at),
                                       perta_array_at(a->q, at),
                                       (struct perta_array){buffer ? buffer : c->room, 0});
    *first += n;
    return 0;
}

static void attend(struct perta_past_tokens *past, const struct perta_layer *l,
                   const struct perta_batch *batch, const struct perta_acts *a)
{
    struct perta_cache *c = (struct perta_cache *)past;
    struct perta_err err = {0};
    int rc = l->be->rc;
    for (size_t i = 0; i < batch->n && !rc; i++) {
        const struct perta_cached *of = &c->of[c->continues[batch->first + i]];
        rc = put(c, l->site.layer, of, of->n, 1, perta_array_at(a->k, i * width_of(c)),
                 perta_array_at(a->v, i * width_of(c)), &err);
    }
    for (size_t first = 0; first < batch->n && !rc;)
        rc = attend_some(c, l, batch, a, &first, &err);
    perta_backend_fail(l->be, rc, &err);
}
