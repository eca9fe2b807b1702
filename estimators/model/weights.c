#include "estimators/model/weights.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/format/convert.h"
#include "io/format/naming.h"
#include "io/format/quantised.h"
#include "io/format/tied.h"
#include "io/format/which.h"

#define PIECE_BYTES (4ull << 20)
#define PIECES 16
#define NAME_BYTES 128

const char *perta_weights_name(char *buf, uint32_t layer, const char *part, const char *kind)
{
    snprintf(buf, NAME_BYTES, "model.layers.%u.%s.%s", layer, part, kind);
    return buf;
}

/* ---- what the architecture wants ---- */

static void linear_shape(const struct perta_llm *llm, enum perta_linear_name name, size_t *out,
                         size_t *in)
{
    size_t H = llm->hidden, I = llm->intermediate;
    size_t Q = (size_t)llm->n_heads * llm->head_dim, K = (size_t)llm->n_kv_heads * llm->head_dim;
    const size_t outs[PERTA_N_LINEARS] = {Q, K, K, H, I, I, H};
    const size_t ins[PERTA_N_LINEARS] = {H, H, H, Q, H, H, I};
    *out = outs[name];
    *in = ins[name];
}

static bool has_bias(const struct perta_llm *llm, enum perta_linear_name name)
{
    return name <= PERTA_V ? llm->qkv_bias : name == PERTA_O ? llm->o_bias : llm->mlp_bias;
}

static size_t norm_size(const struct perta_llm *llm, enum perta_norm_name name)
{
    return name <= PERTA_NORM_2 ? llm->hidden : llm->qk_norm ? llm->head_dim : 0;
}

static int each_of_layer(const struct perta_llm *llm, uint32_t layer, perta_tensor_fn *tensor,
                         void *ctx, struct perta_err *err)
{
    char name[NAME_BYTES];
    int rc = 0;
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++) {
        size_t out, in;
        linear_shape(llm, (enum perta_linear_name)i, &out, &in);
        rc = tensor(ctx, perta_weights_name(name, layer, perta_linear_names[i], "weight"), out, in,
                    err);
        if (!rc && has_bias(llm, (enum perta_linear_name)i))
            rc = tensor(ctx, perta_weights_name(name, layer, perta_linear_names[i], "bias"), 0, out,
                        err);
    }
    for (int i = 0; i < PERTA_N_NORMS && !rc; i++) {
        size_t n = norm_size(llm, (enum perta_norm_name)i);
        if (n)
            rc = tensor(ctx, perta_weights_name(name, layer, perta_norm_names[i], "weight"), 0, n,
                        err);
    }
    return rc;
}

int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err)
{
    int rc = tensor(ctx, PERTA_EMBEDDING, llm->vocab, llm->hidden, err);
    for (uint32_t l = 0; l < llm->n_layers && !rc; l++)
        rc = each_of_layer(llm, l, tensor, ctx, err);
    if (!rc)
        rc = tensor(ctx, PERTA_FINAL_NORM, 0, llm->hidden, err);
    return rc || llm->tied ? rc : tensor(ctx, PERTA_HEAD, llm->vocab, llm->hidden, err);
}

struct checked {
    const struct perta_weights *weights;
    bool *wanted; /* (n_tensors), as by_name */
};

/* rows 0: a vector. */
static int wrong_shape(const struct perta_weights *w, const struct perta_tensor *t, size_t rows,
                       size_t cols, struct perta_err *err)
{
    char shape[128], first[32] = "";
    perta_shape_print(shape, sizeof shape, t);
    if (rows)
        snprintf(first, sizeof first, "%zu, ", rows);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensor %s has not the shape [%s%zu] that config.json calls for, but %s",
                      w->ck->path, t->name, first, cols, shape);
}

static int check_tensor(void *ctx, const char *name, size_t rows, size_t cols,
                        struct perta_err *err)
{
    struct checked *checked = ctx;
    const struct perta_weights *w = checked->weights;
    if (!strcmp(name, PERTA_EMBEDDING))
        name = perta_weights_embedding(w);
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    if (!ref)
        return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s, which its config.json calls for",
                          w->ck->path, name);
    const struct perta_tensor *t = ref->tensor;
    bool fits = rows ? t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols
                     : t->n_dims == 1 && t->shape[0] == cols;
    if (!fits)
        return wrong_shape(w, t, rows, cols, err);
    if (t->dtype != PERTA_F32 && t->dtype != PERTA_BF16 && t->dtype != PERTA_F16)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16 or F32 needed",
                          w->ck->path, name, perta_dtype_name(t->dtype));
    checked->wanted[ref - w->ck->by_name] = true;
    return 0;
}

bool perta_weights_is_parameter(const struct perta_weights *w, const char *name)
{
    if (!strcmp(name, PERTA_HEAD))
        return !strcmp(name, perta_weights_head(w));
    return !perta_is_buffer_name(name);
}

/* A tensor that nothing below would read has no gradient; better said than written as zero. */
static int check_strangers(const struct checked *checked, struct perta_err *err)
{
    const struct perta_weights *w = checked->weights;
    for (uint64_t i = 0; i < w->ck->n_tensors; i++) {
        const char *name = w->ck->by_name[i].tensor->name;
        if (!checked->wanted[i] && perta_weights_is_parameter(w, name))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: has tensor %s, which its config.json does not call for; is it "
                              "another architecture?",
                              w->ck->path, name);
    }
    return 0;
}

int perta_weights_open(struct perta_weights *w, const char *path, struct perta_err *err)
{
    *w = (struct perta_weights){0};
    int rc = perta_checkpoint_open(path, &w->ck, err);
    if (!rc)
        rc = perta_which_model(w->ck, err);
    if (rc)
        return rc;
    if (!w->ck->config)
        return w->ck->config_flaw
                   ? perta_fail(err, PERTA_EINPUT, "%s", w->ck->config_flaw)
                   : perta_fail(err, PERTA_EINPUT,
                                "%s: no config.json, which says what architecture it is", path);
    rc = perta_quantised_refuse(w->ck, err);
    if (rc)
        return rc;
    rc = perta_llm_parse(w->ck->config, w->ck->config_path, &w->llm, err);
    struct checked checked = {w, calloc(w->ck->n_tensors + 1, sizeof *checked.wanted)};
    if (!rc && !checked.wanted)
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        rc = perta_llm_each(&w->llm, check_tensor, &checked, err);
    if (!rc)
        rc = check_strangers(&checked, err);
    if (!rc)
        rc = perta_tied_check(w->ck, err);
    free(checked.wanted);
    return rc;
}

/* safetensors' save_model may leave the head's name to a tied pair; transformers takes either. */
const char *perta_weights_embedding(const struct perta_weights *w)
{
    bool as_head = w->llm.tied && !perta_checkpoint_find(w->ck, PERTA_EMBEDDING) &&
                   perta_checkpoint_find(w->ck, PERTA_HEAD);
    return as_head ? PERTA_HEAD : PERTA_EMBEDDING;
}

const char *perta_weights_head(const struct perta_weights *w)
{
    return w->llm.tied ? perta_weights_embedding(w) : PERTA_HEAD;
}

/* ---- the thread that reads ---- */

/* Where the reader reads ahead, that is over first; how it went is kept. */
static void settle(struct perta_weights *w)
{
    if (!w->ahead || w->ahead_is_done)
        return;
    w->ahead_err = (struct perta_err){0};
    w->ahead_rc = perta_reader_wait(w->reader, &w->ahead_err);
    w->ahead_is_done = true;
}

static int on_reader(struct perta_weights *w, int (*job)(void *ctx, struct perta_err *err),
                     void *ctx, struct perta_err *err)
{
    settle(w);
    perta_reader_begin(w->reader, job, ctx);
    return perta_reader_wait(w->reader, err);
}

static int open_engine(void *of, struct perta_err *err)
{
    struct perta_weights *w = of;
    int rc = perta_engine_open(w->choice.mode, PIECES, &w->engine, err);
    for (uint32_t i = 0; i < w->ck->n_shards && !rc; i++)
        rc = perta_shard_open(&w->ck->shards[i], w->engine->wants_direct, &w->files[i], err);
    return rc || !w->source ? rc : w->source->ops->open(w->source, w->engine->wants_direct, err);
}

static int close_engine(void *of, struct perta_err *err)
{
    (void)err;
    struct perta_weights *w = of;
    perta_engine_close(w->engine);
    w->engine = NULL;
    return 0;
}

int perta_weights_start(struct perta_weights *w, enum perta_io_mode io, struct perta_err *err)
{
    const char **paths = calloc(w->ck->n_shards + 1, sizeof *paths);
    size_t n_paths = 0;
    w->files = calloc(w->ck->n_shards + 1, sizeof *w->files);
    if (!paths || !w->files) {
        free(paths);
        return perta_fail_sys(err, ENOMEM, "%s", w->ck->path);
    }
    for (; n_paths < w->ck->n_shards; n_paths++)
        paths[n_paths] = w->ck->shards[n_paths].path;
    int rc = w->source ? w->source->ops->paths(w->source, &paths, &n_paths, err) : 0;
    if (!rc)
        rc = perta_engine_choose(io, paths, n_paths, &w->choice, err);
    free(paths);
    if (!rc)
        rc = perta_reader_open(&w->reader, err);
    return rc ? rc : on_reader(w, open_engine, w, err);
}

int perta_weights_unchanged(const struct perta_weights *w, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < w->ck->n_shards && !rc; i++)
        rc = perta_file_unchanged(&w->files[i], err);
    return rc || !w->source ? rc : w->source->ops->unchanged(w->source, err);
}

void perta_weights_stop(struct perta_weights *w)
{
    struct perta_err never = {0};
    if (w->reader)
        on_reader(w, close_engine, w, &never);
    perta_reader_close(w->reader);
    w->reader = NULL;
    w->ahead = false;
}

void perta_weights_close(struct perta_weights *w)
{
    perta_weights_stop(w);
    for (uint32_t i = 0; w->files && i < w->ck->n_shards; i++)
        perta_file_close(&w->files[i]);
    free(w->files);
    perta_checkpoint_close(w->ck);
    *w = (struct perta_weights){0};
}

/* ---- reading ---- */

uint64_t perta_weights_room(uint64_t len_bytes)
{
    return perta_align_up(len_bytes, PERTA_BLOCK_BYTES) + PERTA_READ_OVERHANG;
}

static void on_read(struct perta_request *request)
{
    *(bool *)request->user = true;
}

/* In pieces that touch in room. */
int perta_weights_read(struct perta_weights *w, struct perta_file *file, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err)
{
    struct perta_request requests[PIECES];
    bool done[PIECES];
    uint64_t start = perta_align_down(off_bytes, PERTA_BLOCK_BYTES), end = off_bytes + len_bytes;
    int rc = 0;
    for (uint64_t at = start; at < end && !rc;) {
        unsigned n = 0;
        for (; n < PIECES && at < end; n++) {
            uint64_t len = end - at < PIECE_BYTES ? end - at : PIECE_BYTES;
            requests[n] = (struct perta_request){.file = file,
                                                 .off_bytes = at,
                                                 .len_bytes = len,
                                                 .buf = room + (at - start),
                                                 .done = on_read,
                                                 .user = &done[n]};
            done[n] = false;
            perta_engine_submit(w->engine, &requests[n]);
            at += len;
        }
        rc = perta_engine_drain(w->engine, err);
        for (unsigned i = 0; i < n; i++) {
            if (!rc && requests[i].sys_errno)
                rc = perta_request_error(&requests[i], err);
            if (!rc && requests[i].data != requests[i].buf) /* mapped */
                memcpy(requests[i].buf, requests[i].data, requests[i].len_bytes);
            if (!rc)
                rc = perta_engine_check(w->engine, err);
            perta_engine_release(w->engine, &requests[i]);
        }
    }
    *data = room + (off_bytes - start);
    w->read_bytes += len_bytes;
    return rc;
}

static int read_tensor(struct perta_weights *w, const struct perta_ref *ref, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err)
{
    if (!w->source)
        return perta_weights_read(w, &w->files[ref->shard], ref->tensor->off_bytes + off_bytes,
                                  len_bytes, room, data, err);
    *data = room;
    return w->source->ops->read(w->source, w, ref, off_bytes, len_bytes, room, err);
}

/* Products want elements at multiples of their size. */
static void align(uint8_t *room, uint64_t len_bytes, enum perta_dtype dtype, const void **data)
{
    if ((uintptr_t)*data % perta_dtype_unit_bytes(dtype))
        *data = memmove(room, *data, len_bytes);
}

static int read_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                     uint8_t *room, struct perta_linear *linear, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    const struct perta_tensor *t = ref->tensor;
    uint64_t row_bytes = t->shape[1] * perta_dtype_unit_bytes(t->dtype);
    *linear = (struct perta_linear){.dtype = t->dtype, .out = n, .in = t->shape[1]};
    int rc = read_tensor(w, ref, first * row_bytes, n * row_bytes, room, &linear->weight, err);
    if (!rc)
        align(room, n * row_bytes, t->dtype, &linear->weight);
    return rc;
}

static int read_vector(struct perta_weights *w, const char *name, size_t n, uint8_t *room,
                       float *to, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    const struct perta_tensor *t = ref->tensor;
    const void *data;
    int rc = read_tensor(w, ref, 0, t->len_bytes, room, &data, err);
    for (size_t i = 0; i < n && !rc; i++) {
        uint16_t half;
        memcpy(&half, (const uint8_t *)data + 2 * i, t->dtype == PERTA_F32 ? 0 : 2);
        if (t->dtype == PERTA_F32)
            memcpy(&to[i], (const uint8_t *)data + 4 * i, 4);
        else
            to[i] = t->dtype == PERTA_BF16 ? perta_f32_from_bf16(half) : perta_f32_from_f16(half);
    }
    return rc;
}

/* ---- a block ---- */

static uint64_t matrix_room(const struct perta_weights *w, uint32_t layer,
                            enum perta_linear_name name)
{
    char buf[NAME_BYTES];
    const struct perta_ref *ref = perta_checkpoint_find(
        w->ck, perta_weights_name(buf, layer, perta_linear_names[name], "weight"));
    return perta_weights_room(ref->tensor->len_bytes);
}

/* Of a vector: its bytes as they are, which conversion frees again, and as float32. */
static uint64_t vector_room(size_t n)
{
    return perta_align_up(n * sizeof(float), PERTA_BLOCK_BYTES);
}

uint64_t perta_weights_block_room(const struct perta_weights *w)
{
    uint64_t most = 0;
    size_t longest = 0;
    for (uint32_t layer = 0; layer < w->llm.n_layers; layer++) {
        uint64_t room = 0;
        for (int i = 0; i < PERTA_N_LINEARS; i++) {
            size_t out, in;
            linear_shape(&w->llm, (enum perta_linear_name)i, &out, &in);
            room += matrix_room(w, layer, (enum perta_linear_name)i) + vector_room(out);
            longest = out > longest ? out : longest;
        }
        for (int i = 0; i < PERTA_N_NORMS; i++)
            room += vector_room(w->llm.hidden > w->llm.head_dim ? w->llm.hidden : w->llm.head_dim);
        most = room > most ? room : most;
    }
    return most + perta_weights_room(longest * sizeof(float));
}

static int take_vector(struct perta_weights *w, const char *name, size_t n, uint8_t **at,
                       const float **vector, struct perta_err *err)
{
    float *to = (float *)(void *)*at;
    *at += vector_room(n);
    *vector = to;
    return read_vector(w, name, n, *at, to, err); /* what follows is free yet */
}

static int read_block(struct perta_weights *w, uint32_t layer, uint8_t *room,
                      struct perta_block *block, struct perta_err *err)
{
    char name[NAME_BYTES];
    uint8_t *at = room;
    int rc = 0;
    block->window = perta_llm_window(&w->llm, layer);
    for (int i = 0; i < PERTA_N_NORMS && !rc; i++) {
        size_t n = norm_size(&w->llm, (enum perta_norm_name)i);
        block->norm[i] = NULL;
        if (n)
            rc = take_vector(w, perta_weights_name(name, layer, perta_norm_names[i], "weight"), n,
                             &at, &block->norm[i], err);
    }
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++) {
        struct perta_linear *linear = &block->linear[i];
        size_t out, in;
        const float *bias = NULL;
        linear_shape(&w->llm, (enum perta_linear_name)i, &out, &in);
        if (has_bias(&w->llm, (enum perta_linear_name)i))
            rc = take_vector(w, perta_weights_name(name, layer, perta_linear_names[i], "bias"), out,
                             &at, &bias, err);
        if (!rc)
            rc = read_rows(w, perta_weights_name(name, layer, perta_linear_names[i], "weight"), 0,
                           out, at, linear, err);
        at += matrix_room(w, layer, (enum perta_linear_name)i);
        linear->bias = bias;
    }
    return rc;
}

/* ---- what others ask for ---- */

struct wanted {
    struct perta_weights *w;
    const char *name;
    size_t first, n;
    uint8_t *room;
    struct perta_linear *linear;
    float *to;
};

static int rows_wanted(void *ctx, struct perta_err *err)
{
    const struct wanted *a = ctx;
    return read_rows(a->w, a->name, a->first, a->n, a->room, a->linear, err);
}

int perta_weights_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                       uint8_t *room, struct perta_linear *linear, struct perta_err *err)
{
    struct wanted a = {w, name, first, n, room, linear, NULL};
    return on_reader(w, rows_wanted, &a, err);
}

static int vector_wanted(void *ctx, struct perta_err *err)
{
    const struct wanted *a = ctx;
    return read_vector(a->w, a->name, a->n, a->room, a->to, err);
}

int perta_weights_vector(struct perta_weights *w, const char *name, size_t n, uint8_t *room,
                         float *to, struct perta_err *err)
{
    struct wanted a = {w, name, 0, n, room, NULL, to};
    return on_reader(w, vector_wanted, &a, err);
}

static int load(struct perta_weights *w, unsigned i, struct perta_err *err)
{
    struct perta_loaded *l = &w->loaded[i];
    return l->part.name
               ? read_rows(w, l->part.name, l->part.first, l->part.n, w->rooms[i], &l->linear, err)
               : read_block(w, l->part.layer, w->rooms[i], &l->block, err);
}

static int load_current(void *of, struct perta_err *err)
{
    struct perta_weights *w = of;
    return load(w, w->current, err);
}

static int load_ahead(void *of, struct perta_err *err)
{
    struct perta_weights *w = of;
    return load(w, !w->current, err);
}

static bool is_same(const struct perta_part *a, const struct perta_part *b)
{
    return a->name && b->name ? !strcmp(a->name, b->name) && a->first == b->first && a->n == b->n
                              : !a->name && !b->name && a->layer == b->layer;
}

int perta_weights_load(struct perta_weights *w, const struct perta_part *part,
                       const struct perta_part *next, const struct perta_loaded **loaded,
                       struct perta_err *err)
{
    int rc;
    settle(w);
    if (w->ahead && is_same(&w->loaded[!w->current].part, part)) {
        w->current = !w->current;
        rc = w->ahead_rc;
        if (rc)
            *err = w->ahead_err;
    } else {
        w->loaded[w->current].part = *part;
        rc = on_reader(w, load_current, w, err);
    }
    *loaded = &w->loaded[w->current];
    w->ahead = !rc && next && w->rooms[1];
    w->ahead_is_done = false;
    if (w->ahead) {
        w->loaded[!w->current].part = *next;
        perta_reader_begin(w->reader, load_ahead, w);
    }
    return rc;
}
