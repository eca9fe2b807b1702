/* Reading: the reader fills rooms with spans, one parameter after another; the thread that computes
 * waits for each parameter that it needs. */
#include "estimators/model/weights.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "estimators/compute/kernels.h"
#include "io/checked.h"

#define PIECE_BYTES (4ull << 20)

uint64_t perta_weights_room(uint64_t len_bytes)
{
    return perta_align_up(len_bytes, PERTA_BLOCK_BYTES) + PERTA_READ_OVERHANG;
}

/* ---- on the reader ---- */

static void on_read(struct perta_request *request)
{
    *(bool *)request->user = true;
}

/* Read in pieces, which are adjacent in room. */
int perta_weights_read(struct perta_weights *w, struct perta_file *file, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err)
{
    struct perta_request requests[PERTA_WEIGHTS_PIECES];
    bool done[PERTA_WEIGHTS_PIECES];
    uint64_t start = perta_align_down(off_bytes, PERTA_BLOCK_BYTES), end = off_bytes + len_bytes;
    int rc = 0;
    for (uint64_t at = start; at < end && !rc;) {
        unsigned n = 0;
        for (; n < PERTA_WEIGHTS_PIECES && at < end; n++) {
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
            if (!rc && requests[i].data != requests[i].buf) /* a mapped file */
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

/* Move elements to a multiple of their size, which products need. */
static void align(uint8_t *room, uint64_t len_bytes, enum perta_dtype dtype, const void **data)
{
    if ((uintptr_t)*data % perta_dtype_unit_bytes(dtype))
        *data = memmove(room, *data, len_bytes);
}

/* Read rows of a matrix; *data points to them in room. */
static int read_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                     uint8_t *room, const void **data, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    const struct perta_tensor *t = ref->tensor;
    uint64_t row_bytes = t->shape[1] * perta_dtype_unit_bytes(t->dtype);
    int rc = read_tensor(w, ref, first * row_bytes, n * row_bytes, room, data, err);
    if (!rc)
        align(room, n * row_bytes, t->dtype, data);
    return rc;
}

static int read_vector(struct perta_weights *w, const char *name, size_t n, uint8_t *room,
                       float *to, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    const struct perta_tensor *t = ref->tensor;
    const void *data;
    int rc = read_tensor(w, ref, 0, t->len_bytes, room, &data, err);
    if (!rc)
        perta_row_kernels()->to_f32(to, data, t->dtype, n);
    return rc;
}

/* ---- a layer ---- */

static uint64_t matrix_room(const struct perta_weights *w, uint32_t layer,
                            const struct perta_param_row *row)
{
    char name[PERTA_NAME_BYTES];
    const struct perta_ref *ref =
        perta_checkpoint_find(w->ck, perta_llm_name(&w->llm, layer, row, name));
    return perta_weights_room(ref->tensor->len_bytes);
}

/* A vector is kept as float32. */
static uint64_t vector_room(size_t n)
{
    return perta_align_up(n * sizeof(float), PERTA_BLOCK_BYTES);
}

/* The parameter of row i of the table; NULL if the model does not have it. */
static const struct perta_param_row *param_at(const struct perta_llm *llm, size_t i)
{
    return perta_llm_param(llm, llm->family->params[i].param);
}

uint64_t perta_weights_layer_room(const struct perta_weights *w)
{
    uint64_t most = 0;
    size_t longest = 0;
    for (uint32_t layer = 0; layer < w->llm.n_layers; layer++) {
        uint64_t room = 0;
        for (size_t i = 0, out, in; i < w->llm.family->n_params; i++) {
            const struct perta_param_row *row = param_at(&w->llm, i);
            if (!row)
                continue;
            perta_llm_shape(&w->llm, row, &out, &in);
            room += out ? matrix_room(w, layer, row) : vector_room(in);
            longest = !out && in > longest ? in : longest;
        }
        most = room > most ? room : most;
    }
    return most + perta_weights_room(longest * sizeof(float)); /* a vector before its conversion */
}

/* Round a layer's matrix, which was read to data, to the format in which it is served. */
static int round_matrix(const struct perta_weights *w, const char *name,
                        const struct perta_value *value, uint8_t *data, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    size_t bad = perta_round(w->rounding, value->dtype, data, value->out, value->in);
    float x;
    if (bad == value->out * value->in)
        return 0;
    perta_row_kernels()->to_f32(&x, data + bad * perta_dtype_unit_bytes(value->dtype), value->dtype,
                                1);
    return perta_fail(err, PERTA_EINPUT, "%s: tensor %s, element %zu: not a finite number%s%s",
                      w->ck->shards[ref->shard].path, name, bad,
                      isfinite(x) ? " once it is rounded to " : "",
                      isfinite(x) ? perta_rounding_name(w->rounding) : "");
}

/* Read a parameter to *at, and move *at past it. */
static int read_param(struct perta_weights *w, uint32_t layer, const struct perta_param_row *row,
                      unsigned room, uint8_t **at, struct perta_value *value, struct perta_err *err)
{
    char name[PERTA_NAME_BYTES];
    const void *data = *at;
    uint8_t *here = *at;
    int rc;
    perta_llm_name(&w->llm, layer, row, name);
    perta_llm_shape(&w->llm, row, &value->out, &value->in);
    if (value->out) {
        value->dtype = perta_checkpoint_find(w->ck, name)->tensor->dtype;
        *at += matrix_room(w, layer, row);
        rc = read_rows(w, name, 0, value->out, here, &data, err);
        if (!rc && w->rounding)
            rc = round_matrix(w, name, value, here + ((const uint8_t *)data - here), err);
    } else {
        value->dtype = PERTA_F32;
        *at += vector_room(value->in);
        /* the unconverted bytes go to the room behind it, which is not filled yet */
        rc = read_vector(w, name, value->in, *at, (float *)(void *)here, err);
    }
    value->data =
        (struct perta_array){w->buffers[room], (uint64_t)((const uint8_t *)data - w->rooms[room])};
    return rc;
}

static void fill(struct perta_weights *w, struct perta_loaded *l, enum perta_param param, int rc,
                 const struct perta_err *err)
{
    pthread_mutex_lock(&w->lock);
    l->is_there[param] = !rc;
    if (rc) {
        l->rc = rc;
        l->err = *err;
    }
    pthread_cond_broadcast(&w->filled);
    pthread_mutex_unlock(&w->lock);
}

/* Vectors are read first, because a layer starts with a norm. */
static void read_layer(struct perta_weights *w, unsigned room)
{
    struct perta_loaded *l = &w->loaded[room];
    uint8_t *at = w->rooms[room];
    int rc = 0;
    for (int matrices = 0; matrices < 2; matrices++)
        for (size_t i = 0; i < w->llm.family->n_params && !rc; i++) {
            struct perta_err err = {0};
            const struct perta_param_row *row = param_at(&w->llm, i);
            if (!row || (row->out != PERTA_WIDTH_NONE) != matrices)
                continue;
            rc = read_param(w, l->span.layer, row, room, &at, &l->values[row->param], &err);
            fill(w, l, row->param, rc, &err);
        }
}

static void read_matrix(struct perta_weights *w, unsigned room)
{
    struct perta_loaded *l = &w->loaded[room];
    const struct perta_tensor *t = perta_checkpoint_find(w->ck, l->span.name)->tensor;
    struct perta_err err = {0};
    const void *data = w->rooms[room];
    int rc = read_rows(w, l->span.name, l->span.first, l->span.n, w->rooms[room], &data, &err);
    l->values[0] =
        (struct perta_value){{w->buffers[room], (uint64_t)((const uint8_t *)data - w->rooms[room])},
                             t->dtype,
                             l->span.n,
                             t->shape[1]};
    fill(w, l, 0, rc, &err);
}

/* Read what is queued, until the queue is empty. */
static int read_queue(void *of, struct perta_err *err)
{
    struct perta_weights *w = of;
    (void)err; /* each span keeps its own error */
    pthread_mutex_lock(&w->lock);
    while (w->n_queued) {
        unsigned room = w->queue[0];
        w->queue[0] = w->queue[1];
        w->n_queued--;
        pthread_mutex_unlock(&w->lock);
        if (w->loaded[room].span.name)
            read_matrix(w, room);
        else
            read_layer(w, room);
        pthread_mutex_lock(&w->lock);
        w->loaded[room].is_busy = false;
        pthread_cond_broadcast(&w->filled);
    }
    w->is_reading = false;
    pthread_mutex_unlock(&w->lock);
    return 0;
}

/* ---- spans ---- */

int perta_weights_rooms(struct perta_weights *w, struct perta_backend *be, uint8_t *const rooms[2],
                        uint64_t room_bytes, struct perta_err *err)
{
    int rc = 0;
    w->be = be;
    for (int i = 0; i < 2 && !rc; i++)
        if ((w->rooms[i] = rooms[i]))
            rc = be->ops->share(be, rooms[i], room_bytes, &w->buffers[i], err);
    return rc;
}

static bool is_same(const struct perta_span *a, const struct perta_span *b)
{
    return a->name && b->name ? !strcmp(a->name, b->name) && a->first == b->first && a->n == b->n
                              : !a->name && !b->name && a->layer == b->layer;
}

/* Queue a span for a room, once the reader no longer fills that. */
static void queue(struct perta_weights *w, unsigned room, const struct perta_span *span)
{
    bool begin;
    pthread_mutex_lock(&w->lock);
    while (w->loaded[room].is_busy)
        pthread_cond_wait(&w->filled, &w->lock);
    w->loaded[room] = (struct perta_loaded){.span = *span, .is_busy = true};
    w->queue[w->n_queued++] = room;
    begin = !w->is_reading;
    w->is_reading = true;
    pthread_mutex_unlock(&w->lock);
    if (begin) {
        perta_weights_settle(w);
        perta_reader_begin(w->reader, read_queue, w);
    }
}

void perta_weights_begin(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next)
{
    if (w->ahead && is_same(&w->loaded[!w->current].span, span))
        w->current = !w->current;
    else
        queue(w, w->current, span);
    w->ahead = next && w->rooms[1];
    if (w->ahead)
        queue(w, !w->current, next);
}

/* Wait for a value of the current span, and make it known to the backend. */
static int take(struct perta_weights *w, enum perta_param param, struct perta_value *value,
                struct perta_err *err)
{
    struct perta_loaded *l = &w->loaded[w->current];
    pthread_mutex_lock(&w->lock);
    while (!l->is_there[param] && !l->rc)
        pthread_cond_wait(&w->filled, &w->lock);
    int rc = l->is_there[param] ? 0 : l->rc;
    if (rc)
        *err = l->err;
    pthread_mutex_unlock(&w->lock);
    *value = l->values[param];
    if (!rc && !l->is_uploaded[param])
        w->be->ops->uploaded(w->be, value->data,
                             (value->out ? value->out : 1) * value->in *
                                 perta_dtype_unit_bytes(value->dtype));
    l->is_uploaded[param] = true;
    return rc;
}

int perta_weights_get(struct perta_parameters *from, uint32_t layer,
                      const struct perta_param_row *row, struct perta_value *value,
                      struct perta_err *err)
{
    struct perta_weights *w = (struct perta_weights *)(void *)from;
    assert(!w->loaded[w->current].span.name && w->loaded[w->current].span.layer == layer);
    return take(w, row->param, value, err);
}

int perta_weights_matrix(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next, struct perta_linear *rows,
                         struct perta_err *err)
{
    struct perta_value value;
    perta_weights_begin(w, span, next);
    int rc = take(w, 0, &value, err);
    *rows = (struct perta_linear){value.data, value.dtype, value.out, value.in, {0}};
    return rc;
}

/* ---- reading for the host ---- */

struct wanted {
    struct perta_weights *w;
    const char *name;
    size_t first, n;
    uint8_t *room;
    const void **data;
    float *to;
};

static int rows_wanted(void *ctx, struct perta_err *err)
{
    const struct wanted *a = ctx;
    return read_rows(a->w, a->name, a->first, a->n, a->room, a->data, err);
}

int perta_weights_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                       uint8_t *room, const void **data, struct perta_err *err)
{
    struct wanted a = {w, name, first, n, room, data, NULL};
    return perta_weights_on_reader(w, rows_wanted, &a, err);
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
    return perta_weights_on_reader(w, vector_wanted, &a, err);
}
