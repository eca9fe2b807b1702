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
    uint64_t expert;                   /* of which expert */
    const struct perta_file *file;     /* of the last call */
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
        uint64_t all = c->n_matrices * c->rows; /* a tensor's elements, of which there are fewer
                                                 * than 2^63 */
        n[2] = all > PERTA_CHUNK_ELEMS / c->width ? PERTA_CHUNK_ELEMS : all * c->width;
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

/* to[0], to[to_stride], ... = n elements of a tensor: first, first + stride, ... */
static int read_spread(const struct perta_file *file, const struct perta_tensor *tensor,
                       uint64_t first, uint64_t stride, uint64_t n, float *to, uint64_t to_stride,
                       uint8_t *stage, struct perta_err *err)
{
    uint64_t width = perta_dtype_unit_bytes(tensor->dtype);
    uint64_t most = (STAGE_BYTES / width - 1) / stride + 1;
    int rc = 0;
    for (uint64_t done = 0, part; done < n && !rc; done += part) {
        part = n - done < most ? n - done : most;
        rc = perta_pread_all(file->fd, stage, ((part - 1) * stride + 1) * width,
                             tensor->off_bytes + (first + done * stride) * width, file->path, err);
        for (uint64_t i = 0; i < part && !rc; i++)
            to[(done + i) * to_stride] = float_at(tensor->dtype, stage, i * stride);
    }
    return rc;
}

/* n rows of B from row first on, each of the r columns of an expert, as to (n, r); with
 * transposed, as to (r, n). */
static int read_b(const struct perta_file *file, const struct perta_change *c, uint64_t expert,
                  uint64_t first, uint64_t n, float *to, bool transposed, uint8_t *stage,
                  struct perta_err *err)
{
    uint64_t E = c->n_experts, r = c->r;
    int rc = 0;
    first += c->b_first;
    if (E == 1 && !transposed)
        return read_floats(file, c->b->tensor, first * r, n * r, to, 1, stage, err);
    for (uint64_t i = 0; i < n && !rc; i++)
        rc = read_spread(file, c->b->tensor, (first + i) * r * E + expert, E, r,
                         to + (transposed ? i : i * r), transposed ? n : 1, stage, err);
    return rc;
}

/* Columns (r, width): A, or if they are swapped B (width, r) transposed. */
static int read_columns(struct perta_adapter_worker *w, const struct perta_file *file,
                        const struct perta_change *c, uint64_t expert, struct perta_err *err)
{
    if (w->change == c && w->expert == expert)
        return 0;
    w->change = NULL;
    int rc = c->is_swapped ? read_b(file, c, expert, 0, c->width, w->columns, true, w->stage, err)
                           : read_floats(file, c->a->tensor, expert * c->r * c->width,
                                         c->r * c->width, w->columns, 1, w->stage, err);
    if (!rc)
        w->change = c;
    w->expert = expert;
    return rc;
}

/* Rows (n, r): rows of B, or if they are swapped columns of A (r, rows). */
static int read_rows(struct perta_adapter_worker *w, const struct perta_file *file,
                     const struct perta_change *c, uint64_t expert, uint64_t first, uint64_t n,
                     struct perta_err *err)
{
    if (c->is_swapped)
        return read_transposed(file, c->a->tensor, expert * c->r * c->rows + first, c->rows, c->r,
                               n, w->rows, w->stage, err);
    return read_b(file, c, expert, first, n, w->rows, false, w->stage, err);
}

/* n elements, from first_elem on, of a matrix of the tensor. */
static int matrix_tau(struct perta_adapter_worker *w, const struct perta_file *file,
                      const struct perta_change *c, uint64_t matrix, uint64_t first_elem,
                      uint64_t n, float *tau, struct perta_err *err)
{
    uint64_t first = first_elem / c->width, last = (first_elem + n - 1) / c->width;
    w->lora = (struct perta_lora){.rows = w->rows,
                                  .columns = w->columns,
                                  .r = c->r,
                                  .width = c->width,
                                  .first_row = first,
                                  .scaling = c->scaling};
    int rc = read_columns(w, file, c, c->expert + matrix, err);
    if (!rc)
        rc = read_rows(w, file, c, c->expert + matrix, first, last - first + 1, err);
    if (!rc)
        perta_lora_tau(&w->lora, first_elem, n, tau);
    return rc;
}

int perta_adapter_tau(const struct perta_adapter *adapter, const struct perta_file *file,
                      unsigned worker, const struct perta_change *change, uint64_t first_elem,
                      uint64_t n, const float **tau, struct perta_err *err)
{
    struct perta_adapter_worker *w = &adapter->workers[worker];
    uint64_t of_matrix = change->rows * change->width;
    int rc = 0;
    w->file = file;
    for (uint64_t done = 0, part; done < n && !rc; done += part) {
        uint64_t at = (first_elem + done) % of_matrix;
        part = n - done < of_matrix - at ? n - done : of_matrix - at;
        rc = matrix_tau(w, file, change, (first_elem + done) / of_matrix, at, part, w->tau + done,
                        err);
    }
    *tau = w->tau;
    return rc;
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
    struct perta_adapter_worker *w = &adapter->workers[worker];
    const struct perta_lora *l = &w->lora;
    uint64_t matrix = elem / (c->rows * c->width), expert = c->expert + matrix;
    uint64_t row = elem / c->width % c->rows, column = elem % c->width;
    if (expert != w->expert) { /* only the last matrix of the chunk is still there */
        float tau;
        int rc = matrix_tau(w, w->file, c, matrix, row * c->width + column, 1, &tau, err);
        if (rc)
            return rc;
    }
    for (uint64_t k = 0; k < c->r; k++) {
        uint64_t of_a = expert * c->r + k, of_b = k * c->n_experts + expert;
        bool bad_row = !isfinite(l->rows[(row - l->first_row) * c->r + k]);
        if (!bad_row && isfinite(l->columns[k * c->width + column]))
            continue;
        bool is_of_a = bad_row == c->is_swapped;
        if (is_of_a)
            return bad_element(adapter, c->a,
                               c->is_swapped ? of_a * c->rows + row : of_a * c->width + column,
                               may_keep, err);
        uint64_t of = c->b_first + (c->is_swapped ? column : row);
        return bad_element(adapter, c->b, of * c->r * c->n_experts + of_b, may_keep, err);
    }
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensors %s and %s: their product at element %llu of %s overflows "
                      "float32%s",
                      adapter->ck->shards[0].path, c->a->tensor->name, c->b->tensor->name,
                      (ull)elem, c->target,
                      may_keep ? "; --nonfinite keep leaves such parameters unchanged" : "");
}
