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

/* Read n elements of a tensor, from element first on; *data points to them in room. */
static int read_elems(struct perta_weights *w, const struct perta_ref *ref, uint64_t first,
                      uint64_t n, uint8_t *room, const void **data, struct perta_err *err)
{
    const struct perta_tensor *t = ref->tensor;
    uint64_t width = perta_dtype_unit_bytes(t->dtype);
    int rc = read_tensor(w, ref, first * width, n * width, room, data, err);
    if (!rc)
        align(room, n * width, t->dtype, data);
    return rc;
}

/* Read rows of a matrix; *data points to them in room. */
static int read_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                     uint8_t *room, const void **data, struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    uint64_t cols = ref->tensor->shape[1];
    return read_elems(w, ref, first * cols, n * cols, room, data, err);
}

/* Read n elements of a tensor, from element first on, as float32, by way of room. */
static int read_floats(struct perta_weights *w, const struct perta_ref *ref, uint64_t first,
                       size_t n, uint8_t *room, float *to, struct perta_err *err)
{
    const void *data;
    int rc = read_elems(w, ref, first, n, room, &data, err);
    if (!rc)
        perta_row_kernels()->to_f32(to, data, ref->tensor->dtype, n);
    return rc;
}

/* ---- a layer ---- */

static const struct perta_ref *find_param(const struct perta_weights *w, struct perta_site site,
                                          const struct perta_param_row *row)
{
    char name[PERTA_NAME_BYTES];
    return perta_checkpoint_find(w->ck, perta_llm_name(&w->llm, site, row, name));
}

static uint64_t matrix_room(const struct perta_weights *w, struct perta_site site,
                            const struct perta_param_row *row)
{
    size_t out, in;
    enum perta_dtype dtype = find_param(w, site, row)->tensor->dtype;
    perta_llm_shape(&w->llm, row, &out, &in);
    return perta_weights_room((uint64_t)out * in * perta_dtype_unit_bytes(dtype));
}

/* A vector is kept as float32. */
static uint64_t vector_room(size_t n)
{
    return perta_align_up(n * sizeof(float), PERTA_BLOCK_BYTES);
}

/* The parameter of a site with this role; NULL if it has none. */
static const struct perta_param_row *param_at(const struct perta_llm *llm, struct perta_site site,
                                              int param)
{
    const struct perta_param_row *row = perta_llm_param(llm, site.layer, (enum perta_param)param);
    bool of_expert = site.expert != 0;
    return row && perta_is_of_expert(row->param) == of_expert ? row : NULL;
}

static uint64_t site_room(const struct perta_weights *w, struct perta_site site)
{
    uint64_t room = 0;
    size_t longest = 0, out, in;
    for (int p = 0; p < PERTA_N_PARAMS; p++) {
        const struct perta_param_row *row = param_at(&w->llm, site, p);
        if (!row)
            continue;
        perta_llm_shape(&w->llm, row, &out, &in);
        room += out ? matrix_room(w, site, row) : vector_room(in);
        longest = !out && in > longest ? in : longest;
    }
    return room + perta_weights_room(longest * sizeof(float)); /* a vector before its conversion */
}

uint64_t perta_weights_layer_room(const struct perta_weights *w)
{
    uint64_t most = 0;
    for (uint32_t layer = 0; layer < w->llm.n_layers; layer++) {
        uint64_t room = site_room(w, perta_site_of(layer));
        most = room > most ? room : most;
    }
    return most;
}

uint64_t perta_weights_expert_room(const struct perta_weights *w)
{
    uint64_t most = 0;
    for (uint32_t layer = 0; layer < w->llm.n_layers; layer++)
        for (uint32_t e = 0; e < w->llm.n_experts; e++) {
            uint64_t room = site_room(w, perta_site_of_expert(layer, e));
            if (perta_llm_has(&w->llm, layer, PERTA_LAYER_MIXTURE) && room > most)
                most = room;
        }
    return perta_align_up(most, PERTA_BLOCK_BYTES);
}

/* Round a layer's matrix, which was read to data from element first of its tensor on, to the format in which it is served. */
static int round_matrix(const struct perta_weights *w, const struct perta_ref *ref, uint64_t first,
                        const struct perta_value *value, uint8_t *data, struct perta_err *err)
{
    const char *name = ref->tensor->name;
    size_t bad = perta_round(w->rounding, value->dtype, data, value->out, value->in);
    float x;
    if (bad == value->out * value->in)
        return 0;
    perta_row_kernels()->to_f32(&x, data + bad * perta_dtype_unit_bytes(value->dtype), value->dtype,
                                1);
    return perta_fail(err, PERTA_EINPUT, "%s: tensor %s, element %llu: not a finite number%s%s",
                      w->ck->shards[ref->shard].path, name, (unsigned long long)(first + bad),
                      isfinite(x) ? " once it is rounded to " : "",
                      isfinite(x) ? perta_rounding_name(w->rounding) : "");
}

/* Read a parameter to *at, and move *at past it. */
static int read_param(struct perta_weights *w, struct perta_site site,
                      const struct perta_param_row *row, unsigned room, uint8_t **at,
                      struct perta_value *value, struct perta_err *err)
{
    const struct perta_ref *ref = find_param(w, site, row);
    uint64_t first = perta_llm_first(&w->llm, site, row);
    const void *data = *at;
    uint8_t *here = *at;
    int rc;
    perta_llm_shape(&w->llm, row, &value->out, &value->in);
    value->transposed = row->transposed;
    if (value->out) {
        value->dtype = ref->tensor->dtype;
        *at += matrix_room(w, site, row);
        rc = read_elems(w, ref, first, (uint64_t)value->out * value->in, here, &data, err);
        if (!rc && perta_weights_rounds(w, row))
            rc = round_matrix(w, ref, first, value, here + ((const uint8_t *)data - here), err);
    } else {
        value->dtype = PERTA_F32;
        *at += vector_room(value->in);
        /* the unconverted bytes go to the room behind it, which is not filled yet */
        rc = read_floats(w, ref, first, value->in, *at, (float *)(void *)here, err);
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

/* Vectors are read first, because a layer starts with a norm; matrices in the order of the table,
 * which is about that in which they are used. */
static void read_site(struct perta_weights *w, unsigned room)
{
    struct perta_loaded *l = &w->loaded[room];
    const struct perta_family *family = w->llm.family;
    uint8_t *at = w->rooms[room];
    int rc = 0;
    for (int matrices = 0; matrices < 2; matrices++)
        for (size_t i = 0; i < family->n_params && !rc; i++) {
            struct perta_err err = {0};
            const struct perta_param_row *row =
                param_at(&w->llm, l->span.site, family->params[i].param);
            if (row != &family->params[i] || (row->out != PERTA_WIDTH_NONE) != matrices)
                continue;
            rc = read_param(w, l->span.site, row, room, &at, &l->values[row->param], &err);
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
                             t->shape[1],
                             false};
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
        w->n_queued--;
        memmove(w->queue, w->queue + 1, w->n_queued * sizeof *w->queue);
        pthread_mutex_unlock(&w->lock);
        if (w->loaded[room].span.name)
            read_matrix(w, room);
        else
            read_site(w, room);
        pthread_mutex_lock(&w->lock);
        w->loaded[room].is_busy = false;
        pthread_cond_broadcast(&w->filled);
    }
    w->is_reading = false;
    pthread_mutex_unlock(&w->lock);
    return 0;
}

/* ---- spans ---- */

int perta_weights_rooms(struct perta_weights *w, struct perta_backend *be,
                        uint8_t *const rooms[PERTA_WEIGHTS_ROOMS], uint64_t room_bytes,
                        uint64_t expert_bytes, struct perta_err *err)
{
    int rc = 0;
    w->be = be;
    w->current[1] = 2;
    for (int i = 0; i < PERTA_WEIGHTS_ROOMS && !rc; i++)
        if ((w->rooms[i] = rooms[i]))
            rc = be->ops->share(be, rooms[i], i < 2 ? room_bytes : expert_bytes, &w->buffers[i],
                                err);
    return rc;
}

static bool is_same(const struct perta_span *a, const struct perta_span *b)
{
    return a->name && b->name ? !strcmp(a->name, b->name) && a->first == b->first && a->n == b->n
                              : !a->name && !b->name && a->site.layer == b->site.layer &&
                                    a->site.expert == b->site.expert;
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

/* The pair of rooms that a site's parameters are read into. */
static unsigned pair_of(struct perta_site site)
{
    return site.expert != 0;
}

void perta_weights_begin(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next)
{
    unsigned pair = span->name ? 0 : pair_of(span->site);
    unsigned *current = &w->current[pair];
    if (w->ahead[pair] && is_same(&w->loaded[*current ^ 1].span, span))
        *current ^= 1;
    else
        queue(w, *current, span);
    w->ahead[pair] = next && w->rooms[2 * pair + 1];
    if (w->ahead[pair])
        queue(w, *current ^ 1, next);
}

/* Wait for a value of a pair's current span, and make it known to the backend. */
static int take(struct perta_weights *w, unsigned pair, enum perta_param param,
                struct perta_value *value, struct perta_err *err)
{
    struct perta_loaded *l = &w->loaded[w->current[pair]];
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

int perta_weights_get(struct perta_parameters *from, struct perta_site site,
                      const struct perta_param_row *row, struct perta_value *value,
                      struct perta_err *err)
{
    struct perta_weights *w = (struct perta_weights *)(void *)from;
    unsigned pair = perta_is_of_expert(row->param);
    const struct perta_span *span = &w->loaded[w->current[pair]].span;
    assert(!span->name && span->site.layer == site.layer);
    assert(!pair || span->site.expert == site.expert);
    return take(w, pair, row->param, value, err);
}

int perta_weights_matrix(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next, struct perta_linear *rows,
                         struct perta_err *err)
{
    struct perta_value value;
    perta_weights_begin(w, span, next);
    int rc = take(w, 0, 0, &value, err);
    *rows = (struct perta_linear){value.data, value.dtype, value.out, value.in, {0}, false};
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
    return read_floats(a->w, perta_checkpoint_find(a->w->ck, a->name), a->first, a->n, a->room,
                       a->to, err);
}

int perta_weights_vector(struct perta_weights *w, const char *name, size_t first, size_t n,
                         uint8_t *room, float *to, struct perta_err *err)
{
    struct wanted a = {w, name, first, n, room, NULL, to};
    return perta_weights_on_reader(w, vector_wanted, &a, err);
}
