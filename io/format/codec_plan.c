#include "io/format/codec_plan.h"

#include <string.h>

/* The sample is made of blocks of 64 consecutive units, evenly spread. */
#define BLOCK 64

/* Costs are in 1/256 bit, for all units of the sample. */
#define BITS(n) ((uint64_t)(n) * 256)

/* ---- dtypes ---- */

bool perta_codec_is_ordered(enum perta_dtype dtype)
{
    switch (dtype) {
    case PERTA_F8_E5M2:
    case PERTA_F8_E4M3:
    case PERTA_F16:
    case PERTA_BF16:
    case PERTA_F32:
    case PERTA_C64:
    case PERTA_F64:
        return true;
    default:
        return false;
    }
}

struct perta_grouping perta_codec_exponent(enum perta_dtype dtype)
{
    switch (dtype) {
    case PERTA_F16:
        return (struct perta_grouping){10, 5, 0, 1};
    case PERTA_BF16:
        return (struct perta_grouping){7, 8, 0, 1};
    case PERTA_F32:
        return (struct perta_grouping){23, 8, 0, 1};
    case PERTA_F64:
        return (struct perta_grouping){52, 11, 0, 1};
    default:
        return (struct perta_grouping){0, 0, 0, 1};
    }
}

/* ---- what Huffman codes cost ---- */

/* 256 * log2(x) for x > 0, with an error of at most 2. In integers, so that every machine chooses
 * the same plan. */
static uint32_t log2_256(uint32_t x)
{
    uint32_t whole = 31u - (uint32_t)__builtin_clz(x);
    uint32_t f = (uint32_t)(((uint64_t)x << 16 >> whole) & 0xffff); /* x = 2^whole (1 + f) */
    uint32_t bump = (uint32_t)((uint64_t)f * (0x10000 - f) >> 16);
    return whole * 256 + ((f + bump * 88 / 256) >> 8);
}

static uint64_t x_log_x(uint32_t x)
{
    return x ? (uint64_t)x * log2_256(x) : 0;
}

/* Symbols of one kind: how many, the sum of c log c over their counts c, and the largest c. */
struct symbols {
    uint32_t n, most;
    uint64_t sum;
};

static void add_symbol(struct symbols *s, uint32_t count)
{
    s->n += count;
    s->sum += x_log_x(count);
    s->most = count > s->most ? count : s->most;
}

/* What the time to encode and decode a byte is worth. */
#define BYTE_TIME 25

/* Cost of Huffman-coding the symbols, in_a_byte of them per byte: their entropy; the loss of codes
 * with whole bits, at least 3 in 100 bits a byte, and more where one byte is more frequent than all
 * others together; and time. */
static uint64_t huffman_cost(const struct symbols *s, unsigned in_a_byte)
{
    if (!s->n)
        return 0;
    uint64_t entropy = x_log_x(s->n) - (s->sum < x_log_x(s->n) ? s->sum : x_log_x(s->n));
    uint64_t p = ((uint64_t)s->most << 16) / s->n, all = p;
    for (unsigned i = in_a_byte; i > 1; i /= 2)
        all = all * all >> 16;
    uint32_t loss = 8;
    if (all > 0x8000 && all < 0x10000) {
        uint32_t a = (uint32_t)all, b = 0x10000 - a;
        uint32_t h = (uint32_t)(((uint64_t)a * (16 * 256 - log2_256(a)) +
                                 (uint64_t)b * (16 * 256 - log2_256(b))) >>
                                16);
        loss = h < 248 ? 256 - h : loss;
    } else if (all >= 0x10000)
        loss = 0;
    return entropy + (uint64_t)s->n * (loss + BYTE_TIME) / in_a_byte;
}

/* Add the symbols from v up to end. In small chunks nearly all counts are 0. */
static void add_counted(struct symbols *s, const uint32_t *counts, unsigned v, unsigned end)
{
    for (; v < end && v % 8; v++)
        add_symbol(s, counts[v]);
    for (; v + 8 <= end; v += 8) {
        uint32_t any = 0;
        for (unsigned i = 0; i < 8; i++)
            any |= counts[v + i];
        for (unsigned i = 0; any && i < 8; i++)
            add_symbol(s, counts[v + i]);
    }
    for (; v < end; v++)
        add_symbol(s, counts[v]);
}

static void add_symbols(struct symbols *s, const struct symbols *more)
{
    s->n += more->n;
    s->sum += more->sum;
    s->most = more->most > s->most ? more->most : s->most;
}

/* Cost of values with these counts, in fields of 1, 2 or 4 bits or without fields, whichever is
 * cheapest. *bits: that choice. Values that do not fit a field follow after the fields. */
static uint64_t group_cost(const uint32_t counts[256], uint8_t *bits)
{
    static const unsigned ends[] = {1, 3, 15, 256}; /* where fields of 1, 2 and 4 bits end */
    struct symbols parts[4] = {0}, fields = {0}, all = {0};
    for (unsigned i = 0; i < 4; i++)
        add_counted(&parts[i], counts, i ? ends[i - 1] : 0, ends[i]);
    for (unsigned i = 0; i < 4; i++)
        add_symbols(&all, &parts[i]);
    uint64_t best = huffman_cost(&all, 1);
    *bits = 0;
    for (unsigned i = 0; i < 3; i++) {
        struct symbols rest = {0}, coded;
        add_symbols(&fields, &parts[i]);
        for (unsigned j = i + 1; j < 4; j++)
            add_symbols(&rest, &parts[j]);
        coded = fields;
        add_symbol(&coded, rest.n);
        uint64_t cost = huffman_cost(&coded, 8u >> i) + huffman_cost(&rest, 1);
        if (cost < best) {
            best = cost;
            *bits = (uint8_t)(1u << i);
        }
    }
    return best;
}

/* ---- the sample ---- */

static size_t take(const uint8_t *from, unsigned width, size_t n, uint8_t *to)
{
    size_t step = n <= PERTA_SAMPLE_MAX ? BLOCK : n / (PERTA_SAMPLE_MAX / BLOCK), taken = 0;
    for (size_t at = 0; at < n && taken < PERTA_SAMPLE_MAX; at += step) {
        size_t len = n - at < BLOCK ? n - at : BLOCK;
        memcpy(to + taken * width, from + at * width, len * width);
        taken += len;
    }
    return taken;
}

/* Find the largest number of low bits such that few z are less than 2^bits: those bits are noise
 * then, and a code saves nothing on them. Whole bytes, or 1, 2 or 4 bits more than whole bytes. */
static uint8_t choose_low(const struct perta_codec_kernels *kernels, unsigned width,
                          const struct perta_codec_sample *s, size_t n)
{
    uint8_t chosen = 0;
    for (unsigned low = 1; low <= 8 * (width - 1); low++) {
        unsigned bits = low % 8;
        if (bits & (bits - 1))
            continue;
        kernels->split(width, low, s->z, n, NULL, s->values);
        if (kernels->at_least(s->values, 1, n) < n - n * 3 / 10)
            break;
        chosen = (uint8_t)low;
    }
    return chosen;
}

/* ---- the choice ---- */

/* The exponents that are distinguished: where they start, and how many there are. */
static struct perta_grouping window_of(const struct perta_codec_kernels *kernels,
                                       struct perta_grouping e, unsigned width,
                                       struct perta_codec_sample *s, size_t n)
{
    e.first = e.e_bits > 8 ? (1u << (e.e_bits - 1)) - 192 : 0;
    e.n = 256;
    uint8_t top = 0;
    kernels->keys(width, &e, s->before, s->keys, n);
    for (size_t i = 0; i < n; i++)
        top = s->keys[i] > top ? s->keys[i] : top;
    e.first += top >= PERTA_WINDOW ? top - PERTA_WINDOW + 1u : 0;
    e.n = top >= PERTA_WINDOW ? PERTA_WINDOW : top + 1u;
    return e;
}

static void add_counts(uint32_t to[256], const uint32_t counts[256])
{
    for (unsigned v = 0; v < 256; v++)
        to[v] += counts[v];
}

/* Cost of n_crossers among n units: their places, and time for each. */
static uint64_t gaps_cost(uint32_t n_crossers, size_t n)
{
    uint32_t c = n_crossers ? n_crossers : 1;
    return c * (uint64_t)(log2_256((uint32_t)n) - log2_256(c) + BITS(2));
}

/* Choose the lowest exponent with a group of its own. Units below it join that group. */
static void choose_floor(struct perta_codec_sample *s, size_t n, struct perta_codec_plan *plan)
{
    struct perta_grouping *g = &plan->grouping;
    uint64_t low[PERTA_WINDOW], above = 0, best = UINT64_MAX;
    uint8_t bits[PERTA_WINDOW], low_bits[PERTA_WINDOW], cross_bits;
    uint32_t counts[256] = {0}, crossers[256] = {0}, n_crossers = 0, chosen = 0;
    uint64_t crossing = group_cost(crossers, &cross_bits);
    for (uint32_t k = 0; k < g->n; k++) { /* in small chunks most groups are empty */
        if (!s->n_counted[0][k] && !s->n_counted[1][k]) {
            low[k] = k ? low[k - 1] : 0;
            low_bits[k] = k ? low_bits[k - 1] : 0;
            continue;
        }
        add_counts(counts, s->counts[0][k]);
        add_counts(counts, s->counts[1][k]);
        low[k] = group_cost(counts, &low_bits[k]);
    }
    for (uint32_t k = g->n; k-- > 0;) {
        uint64_t cost = low[k] + above + crossing + gaps_cost(n_crossers, n);
        if (cost <= best) {
            best = cost;
            chosen = k;
            plan->bits[g->n - k] = cross_bits;
        }
        above += BITS(160); /* tables, and time */
        bits[k] = 0;
        if (s->n_counted[0][k])
            above += group_cost(s->counts[0][k], &bits[k]);
        if (!s->n_counted[1][k])
            continue;
        add_counts(crossers, s->counts[1][k]);
        n_crossers += s->n_counted[1][k];
        crossing = group_cost(crossers, &cross_bits);
    }
    cross_bits = plan->bits[g->n - chosen];
    for (uint32_t k = chosen; k < g->n; k++)
        plan->bits[k - chosen] = k == chosen ? low_bits[k] : bits[k];
    plan->bits[g->n - chosen] = cross_bits;
    g->first += chosen;
    g->n -= chosen;
}

/* Count the values of the sample by exponent; crossers under the larger of their two. */
static void count_values(const struct perta_codec_kernels *kernels, const struct perta_grouping *g,
                         unsigned width, struct perta_codec_sample *s, size_t n)
{
    memset(s->n_counted, 0, sizeof s->n_counted);
    memset(s->counts[0], 0, g->n * sizeof *s->counts[0]);
    memset(s->counts[1], 0, g->n * sizeof *s->counts[1]);
    if (!g->e_bits) {
        s->n_counted[0][0] = (uint32_t)n;
        for (size_t i = 0; i < n; i++)
            s->counts[0][0][s->values[i]]++;
        return;
    }
    uint8_t *other = s->z;
    kernels->keys(width, g, s->before, s->keys, n);
    kernels->keys(width, g, s->after, other, n);
    for (size_t i = 0; i < n; i++) {
        uint8_t a = s->keys[i], b = other[i];
        s->counts[a != b][a > b ? a : b][s->values[i]]++;
        s->n_counted[a != b][a > b ? a : b]++;
    }
}

void perta_codec_plan(const struct perta_codec_kernels *kernels, enum perta_dtype dtype,
                      const void *before, const void *after, size_t n_units,
                      struct perta_codec_sample *s, struct perta_codec_plan *plan)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    *plan = (struct perta_codec_plan){.grouping = perta_codec_exponent(dtype)};
    size_t n = take(before, width, n_units, s->before);
    take(after, width, n_units, s->after);
    kernels->zigzags(width, perta_codec_is_ordered(dtype), s->before, s->after, s->z, n);
    plan->low = choose_low(kernels, width, s, n);
    kernels->split(width, plan->low, s->z, n, NULL, s->values);
    if (plan->grouping.e_bits)
        plan->grouping = window_of(kernels, plan->grouping, width, s, n);
    count_values(kernels, &plan->grouping, width, s, n);
    choose_floor(s, n, plan);
}

void perta_codec_plan_raw(enum perta_dtype dtype, struct perta_codec_plan *plan)
{
    *plan = (struct perta_codec_plan){
        .grouping = perta_codec_exponent(dtype),
        .low = (uint8_t)(8 * perta_dtype_unit_bytes(dtype)),
        .bits = {1},
    };
}
