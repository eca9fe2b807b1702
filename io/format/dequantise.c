#include "io/format/dequantise.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/format/dequantise_kernels.h"
#include "io/format/quant_config.h"
#include "io/format/quantised.h"
#include "io/isa.h"
#include "io/text.h"

typedef unsigned long long ull;

/* What becomes of a stored tensor. */
enum fate { STAYS, IS_CODES, IS_SCALE, IS_DROPPED };

struct plan {
    struct perta_checkpoint *ck;
    uint32_t n_shards;
    struct perta_quant_config config;
    struct perta_dequantise *d;
    uint8_t **fates; /* (n_shards), of each stored tensor */
};

static uint8_t *fate_of(const struct plan *plan, const struct perta_ref *ref)
{
    return &plan->fates[ref->shard][ref->tensor - plan->ck->shards[ref->shard].header->tensors];
}

/* ---- which scale belongs to which codes ---- */

/* Names of a weight's scale beside M.weight: the suffix that replaces cut of the weight's name. */
struct scale_name {
    const char *cut, *put;
};

static const struct scale_name fp8_names[] = {
    {"", "_scale_inv"}, {"", "_scale"}, {".weight", ".scale"}, {".weight", ".qscale_weight"}, {0}};
static const struct scale_name plain_names[] = {{"", "_scale"}, {0}};
static const struct scale_name mxfp4_names[] = {{"_blocks", "_scales"}, {0}};

static const struct scale_name *names_of(const struct plan *plan)
{
    return plan->config.method == PERTA_QUANT_FP8     ? fp8_names
           : plan->config.method == PERTA_QUANT_MXFP4 ? mxfp4_names
                                                      : plain_names;
}

static bool is_codes(const struct plan *plan, const struct perta_tensor *t)
{
    return plan->config.method == PERTA_QUANT_MXFP4
               ? t->dtype == PERTA_U8 && perta_text_ends_in(t->name, "_blocks")
               : t->dtype == PERTA_F8_E4M3;
}

static int bad(const struct plan *plan, const struct perta_ref *ref, const char *what,
               struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s%s", plan->ck->shards[ref->shard].path,
                      ref->tensor->name, perta_dtype_name(ref->tensor->dtype), what);
}

/* Find the one scale of codes. */
static int find_scale(const struct plan *plan, const struct perta_ref *codes,
                      const struct perta_ref **scale, struct perta_err *err)
{
    const char *name = codes->tensor->name;
    *scale = NULL;
    for (const struct scale_name *n = names_of(plan); n->cut; n++) {
        char *other = NULL;
        if (!perta_text_ends_in(name, n->cut))
            continue;
        if (asprintf(&other, "%.*s%s", (int)(strlen(name) - strlen(n->cut)), name, n->put) < 0)
            return perta_fail_sys(err, ENOMEM, "%s", name);
        const struct perta_ref *found = perta_checkpoint_find(plan->ck, other);
        free(other);
        if (found && *scale)
            return perta_fail(err, PERTA_EINPUT, "%s: tensor %s has two scales, %s and %s",
                              plan->ck->shards[codes->shard].path, name, (*scale)->tensor->name,
                              found->tensor->name);
        *scale = found ? found : *scale;
    }
    return *scale ? 0 : bad(plan, codes, ", but no scale is beside it", err);
}

/* ---- whether they fit ---- */

static int bad_fit(const struct plan *plan, const struct perta_quant *c, struct perta_err *err)
{
    char shapes[2][128];
    const struct perta_tensor *of[] = {&c->codes, &c->scale};
    for (size_t i = 0; i < 2; i++) {
        size_t at = 0;
        shapes[i][0] = '\0';
        for (uint32_t d = 0; d < of[i]->n_dims && at < sizeof shapes[i] - 24; d++)
            at += (size_t)snprintf(shapes[i] + at, sizeof shapes[i] - at, "%s%llu", d ? ", " : "",
                                   (ull)of[i]->shape[d]);
    }
    return perta_fail(
        err, PERTA_EINPUT, "%s: tensor %s of shape (%s) does not fit its scale %s of shape (%s)",
        plan->ck->shards[c->shard].path, c->codes.name, shapes[0], c->scale.name, shapes[1]);
}

static uint64_t divide_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b > 0);
}

/* Of which blocks the grid is. Those that the config names, the last of them smaller, if there are
 * as many; else equal blocks, as transformers takes them. */
static bool set_blocks(const struct plan *plan, struct perta_quant *c)
{
    const uint64_t *block = plan->config.block;
    if (!c->grid_rows || !c->grid_cols)
        return false;
    if (block[0] && c->grid_rows == divide_up(c->rows, block[0]) &&
        c->grid_cols == divide_up(c->cols, block[1])) {
        c->block_rows = block[0];
        c->block_cols = block[1];
        return true;
    }
    c->block_rows = c->rows / c->grid_rows;
    c->block_cols = c->cols / c->grid_cols;
    return c->rows % c->grid_rows == 0 && c->cols % c->grid_cols == 0;
}

/* One scale for all, or scales in as many dimensions as the codes. */
static bool set_grid(const struct plan *plan, struct perta_quant *c)
{
    uint32_t n = c->codes.n_dims;
    c->rows = c->codes.shape[n - 2];
    c->cols = c->codes.shape[n - 1];
    c->is_shared = c->scale.n_elems == 1 && c->scale.n_dims < n;
    c->grid_rows = c->grid_cols = 1;
    if (!c->codes.n_elems)
        return true; /* nothing will be formed */
    if (c->is_shared)
        return set_blocks(plan, c);
    if (c->scale.n_dims != n ||
        memcmp(c->codes.shape, c->scale.shape, (n - 2) * sizeof *c->codes.shape))
        return false;
    c->grid_rows = c->scale.shape[n - 2];
    c->grid_cols = c->scale.shape[n - 1];
    return set_blocks(plan, c);
}

static int fit_e4m3(const struct plan *plan, struct perta_quant *c, const struct perta_ref *scale,
                    struct perta_err *err)
{
    enum perta_dtype dtype = c->scale.dtype;
    bool is_power =
        plan->config.method == PERTA_QUANT_FP8 && (dtype == PERTA_U8 || dtype == PERTA_F8_E8M0);
    if (!is_power && dtype != PERTA_F32 && dtype != PERTA_BF16 && dtype != PERTA_F16)
        return bad(plan, scale, "; scales are F32, BF16 or F16, or F8_E8M0 with fp8", err);
    /* compressed-tensors multiplies in the scale's dtype, except the experts of a mixture. */
    if (plan->config.method == PERTA_QUANT_COMPRESSED && dtype != c->dtype &&
        !strstr(c->codes.name, ".experts."))
        c->first = dtype;
    return c->codes.n_dims < 2 || !set_grid(plan, c) ? bad_fit(plan, c, err) : 0;
}

/* Codes (E, O, G, 16) and scales (E, O, G) give a tensor (E, 32 G, O). */
static int fit_mxfp4(const struct plan *plan, struct perta_quant *c, const struct perta_ref *scale,
                     struct perta_err *err)
{
    if (c->scale.dtype != PERTA_U8 && c->scale.dtype != PERTA_F8_E8M0)
        return bad(plan, scale, "; scales of MXFP4 are U8", err);
    if (c->codes.n_dims != 4 || c->scale.n_dims != 3 ||
        c->codes.shape[3] != PERTA_MXFP4_BLOCK_BYTES ||
        memcmp(c->codes.shape, c->scale.shape, 3 * sizeof *c->codes.shape))
        return bad_fit(plan, c, err);
    c->rows = c->codes.shape[1];
    c->grid_rows = c->rows;
    c->grid_cols = c->codes.shape[2];
    c->block_rows = 1;
    c->block_cols = PERTA_MXFP4_BLOCK;
    if (perta_mul_overflows(c->grid_cols, PERTA_MXFP4_BLOCK, &c->cols))
        return bad_fit(plan, c, err);
    return 0;
}

static int plan_codes(const struct plan *plan, const struct perta_ref *codes, struct perta_quant *c,
                      struct perta_err *err)
{
    const struct perta_ref *scale;
    int rc = find_scale(plan, codes, &scale, err);
    if (rc)
        return rc;
    bool is_mxfp4 = plan->config.method == PERTA_QUANT_MXFP4;
    *c = (struct perta_quant){.coding = is_mxfp4 ? PERTA_CODING_MXFP4 : PERTA_CODING_E4M3,
                              .dtype = plan->config.dtype,
                              .first = PERTA_F32,
                              .shard = codes->shard,
                              .scale_shard = scale->shard,
                              .codes = *codes->tensor,
                              .scale = *scale->tensor};
    if (*fate_of(plan, scale) != STAYS || is_codes(plan, scale->tensor))
        return bad(plan, scale, "; it cannot be the scale of two tensors, or have a scale", err);
    *fate_of(plan, codes) = IS_CODES;
    *fate_of(plan, scale) = IS_SCALE;
    plan->d->n_coded++;
    plan->d->n_scales++;
    return is_mxfp4 ? fit_mxfp4(plan, c, scale, err) : fit_e4m3(plan, c, scale, err);
}

/* ---- what else is beside codes ---- */

/* Scales of activations and of the KV cache: they say how a product is computed with codes, not
 * what the weights are. */
static bool is_of_activations(const char *part)
{
    static const char *const parts[] = {"input_scale", "activation_scale", "output_scale",
                                        "q_scale",     "k_scale",          "v_scale",
                                        "kv_scale",    "input_scale_ub",   NULL};
    for (size_t i = 0; parts[i]; i++)
        if (!strcmp(part, parts[i]))
            return true;
    return false;
}

/* What turns codes into weights, in any format of these methods. */
static bool is_of_codes(const char *part)
{
    static const char *const starts[] = {
        "weight_scale", "weight_zero",  "weight_packed", "weight_global",
        "weight_g_idx", "weight_shape", "qscale_weight", NULL};
    static const char *const ends[] = {"_scale_inv", "_zero_point", "proj_scale", "proj_scales",
                                       NULL};
    for (size_t i = 0; starts[i]; i++)
        if (!strncmp(part, starts[i], strlen(starts[i])))
            return true;
    for (size_t i = 0; ends[i]; i++)
        if (perta_text_ends_in(part, ends[i]))
            return true;
    return false;
}

/* Does the module (len characters, with its dot), or one within it, have codes? by_name[i] is in
 * it. */
static bool has_codes(const struct plan *plan, uint64_t i, size_t len)
{
    const struct perta_ref *all = plan->ck->by_name;
    const char *module = all[i].tensor->name;
    uint64_t low = i, n = plan->ck->n_tensors;
    while (low && !strncmp(all[low - 1].tensor->name, module, len))
        low--;
    for (; low < n && !strncmp(all[low].tensor->name, module, len); low++)
        if (*fate_of(plan, &all[low]) == IS_CODES)
            return true;
    return false;
}

/* Drop what belongs to activations; refuse what belongs to codes, but was not used. */
static int check_stranger(const struct plan *plan, uint64_t i, struct perta_err *err)
{
    const struct perta_ref *ref = &plan->ck->by_name[i];
    const char *name = ref->tensor->name, *dot = strrchr(name, '.');
    const char *part = dot ? dot + 1 : name;
    if (*fate_of(plan, ref) != STAYS)
        return 0;
    if (is_of_activations(part) && ref->tensor->n_elems == 1 &&
        has_codes(plan, i, (size_t)(part - name))) {
        *fate_of(plan, ref) = IS_DROPPED;
        plan->d->n_dropped++;
        return 0;
    }
    return is_of_activations(part) || is_of_codes(part)
               ? bad(plan, ref, ": a scale, or the like, of no tensor that is FP8 or MXFP4", err)
               : 0;
}

/* ---- the checkpoint as dequantised ---- */

/* Give a tensor the name, shape and dtype that it has once dequantised. */
static int change(struct perta_tensor *t, const struct perta_quant *c, struct perta_err *err)
{
    if (c->coding == PERTA_CODING_MXFP4) {
        t->name[strlen(t->name) - strlen("_blocks")] = '\0';
        t->n_dims = 3;
        t->shape[1] = c->cols;
        t->shape[2] = c->rows;
        t->n_elems *= 2;
    }
    t->dtype = c->dtype;
    if (perta_mul_overflows(t->n_elems, perta_dtype_unit_bytes(t->dtype), &t->len_bytes))
        return perta_fail(err, PERTA_EINPUT, "tensor %s: too large", t->name);
    return 0;
}

/* Change the tensors of a shard that are codes, and leave out those that are gone. */
static int change_shard(const struct plan *plan, uint32_t s, struct perta_err *err)
{
    struct perta_header *header = plan->ck->shards[s].header;
    struct perta_quant *coded = plan->d->shards[s];
    uint64_t n = 0;
    int rc = 0;
    for (uint64_t t = 0; t < header->n_tensors && !rc; t++) {
        if (plan->fates[s][t] != STAYS && plan->fates[s][t] != IS_CODES)
            continue;
        if (plan->fates[s][t] == IS_CODES)
            rc = change(&header->tensors[t], &coded[t], err);
        header->tensors[n] = header->tensors[t];
        coded[n++] = coded[t];
    }
    header->n_tensors = n;
    return rc;
}

static int change_all(const struct plan *plan, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t s = 0; s < plan->n_shards && !rc; s++)
        rc = change_shard(plan, s, err);
    return rc ? rc : perta_checkpoint_sort(plan->ck, err);
}

static int allocate(struct plan *plan, struct perta_err *err)
{
    uint32_t n = plan->n_shards;
    plan->d->shards = calloc(n + 1u, sizeof *plan->d->shards);
    plan->fates = calloc(n + 1u, sizeof *plan->fates);
    bool got = plan->d->shards && plan->fates;
    plan->d->n_shards = got ? n : 0;
    for (uint32_t s = 0; s < n && got; s++) {
        uint64_t n_tensors = plan->ck->shards[s].header->n_tensors + 1;
        plan->d->shards[s] = calloc(n_tensors, sizeof **plan->d->shards);
        plan->fates[s] = calloc(n_tensors, sizeof **plan->fates);
        got = plan->d->shards[s] && plan->fates[s];
    }
    return got ? 0 : perta_fail_sys(err, ENOMEM, "%s", plan->ck->path);
}

static int make_plan(struct plan *plan, struct perta_err *err)
{
    struct perta_checkpoint *ck = plan->ck;
    int rc = allocate(plan, err);
    for (uint32_t s = 0; s < plan->n_shards && !rc; s++)
        for (uint64_t t = 0; t < ck->shards[s].header->n_tensors && !rc; t++) {
            const struct perta_ref ref = {&ck->shards[s].header->tensors[t], s};
            if (is_codes(plan, ref.tensor))
                rc = plan_codes(plan, &ref, &plan->d->shards[s][t], err);
        }
    for (uint64_t i = 0; i < ck->n_tensors && !rc; i++)
        rc = check_stranger(plan, i, err);
    if (!rc && !plan->d->n_coded)
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: no tensor is quantised as \"quantization_config\" says; where full "
                        "weights are stored, remove that key",
                        ck->config_path);
    return rc ? rc : change_all(plan, err);
}

int perta_dequantise_open(struct perta_checkpoint *ck, struct perta_dequantise **out,
                          struct perta_err *err)
{
    const json_t *value;
    const char *key = perta_quant_config_key(ck->config, &value);
    struct plan plan = {.ck = ck, .n_shards = ck->n_shards};
    *out = NULL;
    if (!key)
        return perta_quantised_refuse(ck, err);
    int rc = perta_quant_config_parse(ck, key, value, &plan.config, err);
    if (!rc && !(plan.d = calloc(1, sizeof *plan.d)))
        rc = perta_fail_sys(err, ENOMEM, "%s", ck->path);
    if (rc)
        return rc;
    rc = make_plan(&plan, err);
    if (!rc)
        rc = perta_quantised_refuse_tensors(ck, err);
    for (uint32_t s = 0; plan.fates && s < plan.n_shards; s++)
        free(plan.fates[s]);
    free(plan.fates);
    if (rc)
        perta_dequantise_close(plan.d);
    else
        *out = plan.d;
    return rc;
}

void perta_dequantise_close(struct perta_dequantise *d)
{
    for (uint32_t s = 0; d && s < d->n_shards; s++)
        free(d->shards[s]);
    free(d ? d->shards : NULL);
    free(d);
}

const struct perta_quant *perta_dequantise_find(const struct perta_dequantise *d,
                                                const struct perta_checkpoint *ck,
                                                const struct perta_ref *ref)
{
    return &d->shards[ref->shard][ref->tensor - ck->shards[ref->shard].header->tensors];
}

/* ---- numbers ---- */

uint64_t perta_quant_unit(const struct perta_quant *c)
{
    return c->coding == PERTA_CODING_MXFP4 ? c->rows * c->cols : 1;
}

/* Number of the grid's row that a row of all matrices, one after another, belongs to. */
static uint64_t grid_row(const struct perta_quant *c, uint64_t row)
{
    uint64_t matrix = c->is_shared ? 0 : row / c->rows * c->grid_rows;
    return matrix + row % c->rows / c->block_rows;
}

static uint64_t row_bytes_of_grid(const struct perta_quant *c)
{
    return c->grid_cols * perta_dtype_unit_bytes(c->scale.dtype);
}

void perta_quant_need(const struct perta_quant *c, uint64_t first, uint64_t n,
                      struct perta_extent *codes, struct perta_extent *scales)
{
    *codes = (struct perta_extent){c->shard, c->codes.off_bytes + first, n};
    uint64_t g = grid_row(c, first / c->cols), end = grid_row(c, (first + n - 1) / c->cols) + 1;
    if (c->coding == PERTA_CODING_MXFP4) {
        codes->off_bytes = c->codes.off_bytes + first / 2;
        codes->len_bytes = n / 2;
        g = first / c->cols;
        end = g + c->rows;
    } else if (c->is_shared) {
        g = 0, end = 1;
    }
    *scales = (struct perta_extent){c->scale_shard, c->scale.off_bytes + g * row_bytes_of_grid(c),
                                    (end - g) * row_bytes_of_grid(c)};
}

static float scale_at(const struct perta_quant *c, const uint8_t *scales, uint64_t i)
{
    uint16_t half;
    float whole;
    switch (c->scale.dtype) {
    case PERTA_U8:
    case PERTA_F8_E8M0:
        return perta_e8m0(scales[i]);
    case PERTA_BF16:
    case PERTA_F16:
        memcpy(&half, scales + 2 * i, sizeof half);
        return c->scale.dtype == PERTA_F16 ? perta_f32_from_f16(half) : perta_f32_from_bf16(half);
    default:
        memcpy(&whole, scales + 4 * i, sizeof whole);
        return whole;
    }
}

static const struct perta_dequantise_kernels *kernels(void)
{
    static const struct perta_dequantise_kernels *const all[PERTA_N_ISAS] = {
        &perta_dequantise_kernels_v2, &perta_dequantise_kernels_v3, &perta_dequantise_kernels_v4};
    return all[perta_isa_chosen()];
}

/* Elements from first on, up to end, which share a scale within a row: their number, and *i is that
 * of the scale among those from grid row g0 on. */
static uint64_t run_at(const struct perta_quant *c, uint64_t first, uint64_t end, uint64_t g0,
                       uint64_t *i)
{
    uint64_t row = first / c->cols, col = first % c->cols, block = col / c->block_cols;
    uint64_t stop = (block + 1) * c->block_cols;
    stop = (stop < c->cols ? stop : c->cols) - col + first;
    *i = (grid_row(c, row) - g0) * c->grid_cols + block;
    return (stop < end ? stop : end) - first;
}

static uint64_t form_e4m3(const struct perta_quant *c, uint64_t first, uint64_t n,
                          const uint8_t *codes, const uint8_t *scales, uint8_t *to)
{
    const struct perta_dequantise_kernels *k = kernels();
    uint64_t g0 = grid_row(c, first / c->cols), width = perta_dtype_unit_bytes(c->dtype);
    uint64_t n_bad = 0, i;
    for (uint64_t at = 0, m; at < n; at += m) {
        m = run_at(c, first + at, first + n, g0, &i);
        n_bad +=
            k->e4m3(codes + at, scale_at(c, scales, i), m, c->first, c->dtype, to + at * width);
    }
    return n_bad;
}

/* Where in scales, and in codes, the scale and the code of an element of the result are. */
static void find_parts(const struct perta_quant *c, uint64_t first, uint64_t elem, uint64_t *scale,
                       uint64_t *code)
{
    if (c->coding == PERTA_CODING_MXFP4) { /* elem is i * rows + r of its matrix */
        uint64_t row = elem % c->rows, col = elem / c->rows;
        *code = row * c->cols + col;
        *scale = *code / PERTA_MXFP4_BLOCK;
    } else {
        run_at(c, first + elem, first + elem + 1, grid_row(c, first / c->cols), scale);
        *code = elem;
    }
}

static bool is_finite(const uint8_t *x, enum perta_dtype dtype)
{
    uint32_t u = 0;
    memcpy(&u, x, perta_dtype_unit_bytes(dtype));
    uint32_t inf = dtype == PERTA_BF16 ? 0x7f80 : dtype == PERTA_F16 ? 0x7c00 : 0x7f800000;
    return (u & inf) != inf;
}

/* Name the first element of to that is not finite, and whose fault that is. */
static int not_finite(const struct perta_quant *c, uint64_t first, const uint8_t *codes,
                      const uint8_t *scales, const uint8_t *to, const struct perta_checkpoint *ck,
                      struct perta_err *err)
{
    uint64_t width = perta_dtype_unit_bytes(c->dtype), elem = 0, scale, code;
    while (is_finite(to + elem * width, c->dtype))
        elem++;
    find_parts(c, first, elem, &scale, &code);
    struct perta_extent need[2];
    perta_quant_need(c, first, elem + 1, &need[0], &need[1]);
    uint64_t before =
        (need[1].off_bytes - c->scale.off_bytes) / perta_dtype_unit_bytes(c->scale.dtype);
    if (!isfinite(scale_at(c, scales, scale)))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s, element %llu: not a finite number",
                          ck->shards[c->scale_shard].path, c->scale.name, (ull)(before + scale));
    bool is_nan = c->coding == PERTA_CODING_E4M3 && (codes[code] & 0x7f) == 0x7f;
    return perta_fail(err, PERTA_EINPUT, "%s: tensor %s, element %llu: not a finite number%s%s",
                      ck->shards[c->shard].path, c->codes.name, (ull)(first + elem),
                      is_nan ? "" : " once it is dequantised to ",
                      is_nan ? "" : perta_dtype_name(c->dtype));
}

int perta_quant_form(const struct perta_quant *c, uint64_t first, uint64_t n, const uint8_t *codes,
                     const uint8_t *scales, void *to, const struct perta_checkpoint *ck,
                     struct perta_err *err)
{
    uint64_t n_bad;
    assert(c->coding != PERTA_CODING_NONE && first % perta_quant_unit(c) == 0);
    if (c->coding == PERTA_CODING_MXFP4)
        n_bad = kernels()->mxfp4(codes, scales, c->rows, c->grid_cols, c->dtype, to);
    else
        n_bad = form_e4m3(c, first, n, codes, scales, to);
    return n_bad ? not_finite(c, first, codes, scales, to, ck, err) : 0;
}
