/* The task vector of a LoRA. A worker caches A (of an embedding, B) of its current tensor in
 * float32, as the columns that all rows share, and reads the rows that it needs of the other factor
 * for each chunk. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/adapter.h"
#include "io/checked.h"
#include "io/format/codec.h"
#include "io/format/convert.h"

#define STAGE_BYTES (64u << 10)
#define FLOATS_MAX (1ull << 40) /* more than any machine's memory */
typedef unsigned long long ull;

struct perta_adapter_worker {
    const struct perta_change *change; /* whose columns are cached; NULL if none */
    struct perta_lora lora;
    float *rows, *columns, *tau; /* each has room for the largest */
    uint8_t *stage;              /* (STAGE_BYTES) elements as read from the file */
};

/* ---- memory ---- */

/* The most rows that a chunk can touch: it may begin and end in the middle of a row. */
static uint64_t rows_max(const struct perta_change *c)
{
    uint64_t n = PERTA_CHUNK_ELEMS / c->width + 2;
    return n < c->rows ? n : c->rows;
}

/* How many floats a worker needs for rows, columns and tau. Returns false if that overflows. */
static bool count_floats(const struct perta_adapter *adapter, uint64_t floats[3])
{
    memset(floats, 0, 3 * sizeof *floats);
    for (uint64_t i = 0; i < adapter->n_changes; i++) {
        const struct perta_change *c = &adapter->changes[i];
        uint64_t n[3];
        if (c->whole || !c->rows || !c->width)
            continue;
        n[2] = c->rows > PERTA_CHUNK_ELEMS / c->width ? PERTA_CHUNK_ELEMS : c->rows * c->width;
        if (perta_mul_overflows(rows_max(c), c->r, &n[0]) ||
            perta_mul_overflows(c->width, c->r, &n[1]))
            return false;
        for (int k = 0; k < 3; k++)
            floats[k] = n[k] > floats[k] ? n[k] : floats[k];
    }
    return floats[0] < FLOATS_MAX && floats[1] < FLOATS_MAX;
}

uint64_t perta_adapter_memory(const struct perta_adapter *adapter)
{
    uint64_t floats[3];
    if (!count_floats(adapter, floats))
        return UINT64_MAX;
    return STAGE_BYTES + (floats[0] + floats[1] + floats[2]) * sizeof(float);
}

static float *take(uint64_t n_floats)
{
    return malloc(n_floats ? n_floats * sizeof(float) : 1);
}

int perta_adapter_begin(struct perta_adapter *adapter, unsigned n_workers, struct perta_err *err)
{
    uint64_t floats[3];
    bool enough = count_floats(adapter, floats);
    adapter->workers = enough ? calloc(n_workers, sizeof *adapter->workers) : NULL;
    adapter->n_workers = adapter->workers ? n_workers : 0;
    enough = adapter->workers;
    for (unsigned i = 0; i < adapter->n_workers && enough; i++) {
        struct perta_adapter_worker *w = &adapter->workers[i];
        w->rows = take(floats[0]);
        w->columns = take(floats[1]);
        w->tau = take(floats[2]);
        w->stage = malloc(STAGE_BYTES);
        enough = w->rows && w->columns && w->tau && w->stage;
    }
    return enough ? 0 : perta_fail_sys(err, ENOMEM, "%s", adapter->ck->path);
}

void perta_adapter_end(struct perta_adapter *adapter)
{
    for (unsigned i = 0; i < adapter->n_workers; i++) {
        free(adapter->workers[i].rows);
        free(adapter->workers[i].columns);
        free(adapter->workers[i].tau);
        free(adapter->workers[i].stage);
    }
    free(adapter->workers);
    adapter->workers = NULL;
    adapter->n_workers = 0;
}

/* ---- reading ---- */

static float float_at(enum perta_dtype dtype, const uint8_t *stage, uint64_t i)
{
    uint32_t u;
    uint16_t h;
    if (dtype == PERTA_F32) {
        memcpy(&u, stage + i * sizeof u, sizeof u);
        return perta_f32_from_bits(u);
    }
    memcpy(&h, stage + i * sizeof h, sizeof h);
    return dtype == PERTA_F16 ? perta_f32_from_f16(h) : perta_f32_from_bf16(h);
}

/* to[0], to[stride], ... = n elements of a tensor, from first on. */
static int read_floats(const struct perta_file *file, const struct perta_tensor *tensor,
                       uint64_t first, uint64_t n, float *to, uint64_t stride, uint8_t *stage,
                       struct perta_err *err)
{
    uint64_t width = perta_dtype_unit_bytes(tensor->dtype), most = STAGE_BYTES / width;
    int rc = 0;
    for (uint64_t done = 0, part; done < n && !rc; done += part) {
        part = n - done < most ? n - done : most;
        rc = perta_pread_all(file->fd, stage, part * width,
                             tensor->off_bytes + (first + done) * width, file->path, err);
        for (uint64_t i = 0; i < part && !rc; i++)
            to[(done + i) * stride] = float_at(tensor->dtype, stage, i);
    }
    return rc;
}

/* Read n vectors of len elements as the columns of a matrix (len, n). The first vector begins at
 * element first, and each of the others step elements after the one before it. */
static int read_transposed(const struct perta_file *file, const struct perta_tensor *tensor,
                           uint64_t first, uint64_t step, uint64_t n, uint64_t len, float *to,
                           uint8_t *stage, struct perta_err *err)
{
    int rc = 0;
    for (uint64_t i = 0; i < n && !rc; i++)
        rc = read_floats(file, tensor, first + i * step, len, to + i, n, stage, err);
    return rc;
}

/* Columns (r, width): A, or for an embedding B (width, r) transposed. */
static int read_columns(struct perta_adapter_worker *w, const struct perta_file *file,
                        const struct perta_change *c, struct perta_err *err)
{
    if (w->change == c)
        return 0;
    w->change = NULL;
    int rc = c->is_embedding ? read_transposed(file, c->b->tensor, 0, c->r, c->width, c->r,
                                               w->columns, w->stage, err)
                             : read_floats(file, c->a->tensor, 0, c->r * c->width, w->columns, 1,
                                           w->stage, err);
    if (!rc)
        w->change = c;
    return rc;
}

/* Rows (n, r): rows of B, or for an embedding columns of A (r, rows). */
static int read_rows(struct perta_adapter_worker *w, const struct perta_file *file,
                     const struct perta_change *c, uint64_t first, uint64_t n,
                     struct perta_err *err)
{
    if (c->is_embedding)
        return read_transposed(file, c->a->tensor, first, c->rows, c->r, n, w->rows, w->stage, err);
    return read_floats(file, c->b->tensor, first * c->r, n * c->r, w->rows, 1, w->stage, err);
}

int perta_adapter_tau(const struct perta_adapter *adapter, const struct perta_file *file,
                      unsigned worker, const struct perta_change *change, uint64_t first_elem,
                      uint64_t n, const float **tau, struct perta_err *err)
{
    struct perta_adapter_worker *w = &adapter->workers[worker];
    uint64_t first = first_elem / change->width, last = (first_elem + n - 1) / change->width;
    w->lora = (struct perta_lora){.rows = w->rows,
                                  .columns = w->columns,
                                  .r = change->r,
                                  .width = change->width,
                                  .first_row = first,
                                  .scaling = change->scaling};
    int rc = read_columns(w, file, change, err);
    if (!rc)
        rc = read_rows(w, file, change, first, last - first + 1, err);
    if (rc)
        return rc;
    perta_lora_tau(&w->lora, first_elem, n, w->tau);
    *tau = w->tau;
    return 0;
}

/* ---- numbers that are not finite ---- */

static int bad_element(const struct perta_adapter *adapter, const struct perta_ref *ref,
                       uint64_t elem, bool may_keep, struct perta_err *err)
{
    const struct perta_tensor *t = ref->tensor;
    return perta_fail(
        err, PERTA_EINPUT, "%s: tensor %s, element %llu (byte %llu): not a finite number%s",
        adapter->ck->shards[ref->shard].path, t->name, (ull)elem,
        (ull)(t->off_bytes + elem * perta_dtype_unit_bytes(t->dtype)),
        may_keep ? "; --nonfinite keep leaves the parameters that depend on it unchanged" : "");
}

int perta_adapter_bad_number(const struct perta_adapter *adapter, unsigned worker,
                             const struct perta_change *c, uint64_t elem, bool may_keep,
                             struct perta_err *err)
{
    const struct perta_lora *l = &adapter->workers[worker].lora;
    uint64_t row = elem / c->width, column = elem % c->width;
    for (uint64_t k = 0; k < c->r; k++) {
        bool bad_row = !isfinite(l->rows[(row - l->first_row) * c->r + k]);
        if (!bad_row && isfinite(l->columns[k * c->width + column]))
            continue;
        if (c->is_embedding)
            return bad_row ? bad_element(adapter, c->a, k * c->rows + row, may_keep, err)
                           : bad_element(adapter, c->b, column * c->r + k, may_keep, err);
        return bad_row ? bad_element(adapter, c->b, row * c->r + k, may_keep, err)
                       : bad_element(adapter, c->a, k * c->width + column, may_keep, err);
    }
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensors %s and %s: their product at element %llu of %s overflows "
                      "float32%s",
                      adapter->ck->shards[0].path, c->a->tensor->name, c->b->tensor->name,
                      (ull)elem, c->target,
                      may_keep ? "; --nonfinite keep leaves such parameters unchanged" : "");
}
