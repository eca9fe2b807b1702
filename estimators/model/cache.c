#include "estimators/model/cache.h"

#include <errno.h>
#include <stdlib.h>

/* Of sequences whose keys and values are read from a file, about as many are read at once. */
#define ROOM_BYTES (4ull << 20)

static void attend(struct perta_past_tokens *past, const struct perta_layer *layer,
                   const struct perta_batch *batch, const struct perta_acts *acts);

/* ---- memory ---- */

/* Floats of a token's keys, and of its values. */
static size_t key_width(const struct perta_cache *c)
{
    return (size_t)c->llm->n_kv_heads * c->llm->head_dim;
}

static size_t value_width(const struct perta_cache *c)
{
    return (size_t)c->llm->n_kv_heads * c->llm->value_dim;
}

/* Floats of what is kept of n tokens. */
static uint64_t floats_of(const struct perta_cache *c, uint64_t n)
{
    return n * (key_width(c) + value_width(c));
}

int perta_cache_plan(struct perta_cache *c, const struct perta_llm *llm, struct perta_cached *of,
                     uint64_t n, struct perta_err *err)
{
    *c = (struct perta_cache){.past.attend = attend, .llm = llm, .of = of, .n = n};
    c->pasts = calloc(n, sizeof *c->pasts);
    c->kept = calloc(llm->n_layers, sizeof *c->kept);
    for (uint64_t i = 0; i < n; i++) {
        of[i].keys = c->n_floats;
        of[i].values = of[i].keys + (uint64_t)of[i].most * key_width(c);
        c->n_floats += floats_of(c, of[i].most);
        c->longest = of[i].most > c->longest ? of[i].most : c->longest;
    }
    return c->pasts && c->kept ? 0 : perta_fail_sys(err, ENOMEM, "keys and values");
}

uint64_t perta_cache_room_bytes(const struct perta_cache *c)
{
    uint64_t one = floats_of(c, c->longest) * sizeof(float);
    uint64_t all = c->n_floats * sizeof(float);
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
        rc = perta_store_open(&c->kept[l], scratch, NULL, c->n_floats, 1, err);
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

/* Write keys and values of n tokens of a sequence, from its token at on: those of a batch, from its
 * token i on. */
static int put(struct perta_cache *c, uint32_t layer, const struct perta_cached *of, uint32_t at,
               uint32_t n, const struct perta_acts *acts, uint64_t i, struct perta_err *err)
{
    size_t K = key_width(c), V = value_width(c);
    int rc = perta_store_set(&c->kept[layer], of->keys + at * K, n * K,
                             perta_array_at(acts->k, i * K), err);
    return rc ? rc
              : perta_store_set(&c->kept[layer], of->values + at * V, n * V,
                                perta_array_at(acts->v, i * V), err);
}

int perta_cache_keep(struct perta_cache *c, uint32_t layer, const struct perta_batch *batch,
                     const struct perta_acts *acts, struct perta_err *err)
{
    int rc = 0;
    for (uint64_t i = 0; i < c->n && !rc; i++) {
        const struct perta_cached *of = &c->of[i];
        if (of->first >= batch->first && of->first < batch->first + batch->n)
            rc = put(c, layer, of, 0, of->n, acts, of->first - batch->first, err);
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
static uint32_t first_seen(const struct perta_attention *a, uint32_t n)
{
    uint32_t window = n > a->window ? n - a->window : 0;
    uint32_t chunk = a->chunk ? (n - 1) / a->chunk * a->chunk : 0;
    return window > chunk ? window : chunk;
}

/* Where the keys and values are that a token sees which is added to a sequence: in the store, if it
 * is in memory; otherwise they are read to the room, from float *at on, which moves past them.
 * Returns 1 if they do not fit. */
static int find(struct perta_cache *c, const struct perta_attention *a,
                const struct perta_cached *of, const struct perta_store *kept, uint64_t *at,
                struct perta_past *past, struct perta_err *err)
{
    struct perta_array room = {c->room, 0};
    uint32_t first = first_seen(a, of->n + 1), n = of->n + 1 - first;
    uint64_t K = key_width(c), V = value_width(c);
    uint64_t keys = of->keys + first * K, values = of->values + first * V;
    *past = (struct perta_past){.keys = keys, .values = values, .first = first, .n = n};
    if (kept->buffer)
        return 0;
    if ((*at + floats_of(c, n)) * sizeof(float) > perta_cache_room_bytes(c))
        return 1;
    past->keys = *at;
    past->values = *at + n * K;
    *at += floats_of(c, n);
    int rc = perta_store_load(kept, keys, n * K, perta_array_at(room, past->keys), err);
    return rc ? rc : perta_store_load(kept, values, n * V, perta_array_at(room, past->values), err);
}

/* Attention of the tokens of a batch from first on, as many as there is room for; first moves past
 * them. */
static int attend_some(struct perta_cache *c, const struct perta_layer *l,
                       const struct perta_batch *batch, const struct perta_acts *acts,
                       size_t *first, struct perta_err *err)
{
    const struct perta_store *kept = &c->kept[l->site.layer];
    const uint32_t *continues = c->continues + batch->first + *first;
    struct perta_attention_past past = {.of = perta_layer_attention(l, batch),
                                        .pasts = c->pasts + *first};
    size_t q = *first * past.of.n_heads * past.of.D, out = *first * past.of.n_heads * past.of.V;
    uint64_t at = 0;
    int rc = 0;
    while (*first + past.n < batch->n && !rc) {
        rc = find(c, &past.of, &c->of[continues[past.n]], kept, &at, &c->pasts[*first + past.n],
                  err);
        past.n += !rc;
    }
    if (rc < 0)
        return rc;
    l->be->ops->attention_past_forward(
        l->be, &past, perta_array_at(acts->att, out), perta_array_at(acts->q, q),
        (struct perta_array){kept->buffer ? kept->buffer : c->room, 0});
    *first += past.n;
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
        rc = put(c, l->site.layer, of, of->n, 1, a, i, &err);
    }
    for (size_t first = 0; first < batch->n && !rc;)
        rc = attend_some(c, l, batch, a, &first, &err);
    perta_backend_fail(l->be, rc, &err);
}
