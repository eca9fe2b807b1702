#include "io/codec_plan.h"

#include <string.h>

/* Of every so many units in a row the first 64 are looked at. */
#define BLOCK 64

/* Costs are in bits / 256 for all units of the sample. */
#define BITS(n) ((uint64_t)(n)*256)

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

/* 256 * log2(x), x > 0, within 2; whole numbers, so that every machine chooses alike. */
static uint32_t log2_256(uint32_t x)
{
    uint32_t whole = 31u - (uint32_t)__builtin_clz(x);
    uint32_t f =
        (uint32_t)(((uint64_t)x << 16 >> whole) & 0xffff); /* x = 2^whole (1 + f) */
    uint32_t bump = (uint32_t)((uint64_t)f * (0x10000 - f) >> 16);
    return whole * 256 + ((f + bump * 88 / 256) >> 8);
}

static uint64_t x_log_x(uint32_t x)
{
    return x ? (uint64_t)x * log2_256(x) : 0;
}

/* Symbols of one kind: how many, sum of c log c over their counts c, the largest c. */
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

/* So many of them in a byte: their entropy; what a code of whole bits loses, at least 3 in
 * 100 bits a byte, and where one byte is more frequent than all others what its own bit
 * exceeds its information by. */
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
    return entropy + (uint64_t)s->n * loss / in_a_byte;
}

/* What values with these counts cost in fields of bits bits, the rest after them. */
static uint64_t fields_cost(const uint32_t counts[256], unsigned bits)
{
    struct symbols fields = {0}, rest = {0};
    unsigned full = (1u << bits) - 1;
    for (unsigned v = full; v < 256; v++)
        if (counts[v])
            add_symbol(&rest, counts[v]);
    if (!bits)
        return huffman_cost(&rest, 1);
    for (unsigned v = 0; v < full; v++)
        add_symbol(&fields, counts[v]);
    add_symbol(&fields, rest.n);
    return huffman_cost(&fields, 8 / bits) + huffman_cost(&rest, 1);
}

/* The cheapest, and its cost. Values of several bytes are counted by length, which says how
 * groups differ, not what they cost: a zero among them costs in each byte, so it gets a
 * field. */
static uint64_t group_cost(const uint32_t counts[256], bool exact, uint8_t *bits)
{
    uint64_t best = fields_cost(counts, 0);
    *bits = 0;
    if (!exact) {
        uint32_t n = 0;
        for (unsigned v = 0; v < 256; v++)
            n += counts[v];
        *bits = counts[0] > n / 64;
        return best;
    }
    for (uint8_t b = 1; b <= 4; b = (uint8_t)(b * 2)) {
        uint64_t cost = fields_cost(counts, b);
        if (cost < best) {
            best = cost;
            *bits = b;
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

/* Values as symbols of one byte, into the first plane: themselves, or how many bits they
 * have. */
static void to_symbols(uint8_t *planes, unsigned width, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned len = 0;
        for (unsigned b = width; b-- && !len;) {
            unsigned byte = planes[b * n + i];
            if (byte)
                len = 8 * b + 32 - (unsigned)__builtin_clz(byte);
        }
        planes[i] = (uint8_t)len;
    }
}

/* Is one byte enough for nearly all? */
static bool is_narrow(const struct perta_codec_sample *s, unsigned width, size_t n)
{
    size_t n_over = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned high = 0;
        for (unsigned b = 1; b < width; b++)
            high |= s->planes[b * n + i];
        n_over += high || s->planes[i] == 255;
    }
    return width > 1 && n_over <= n / 16;
}

/* ---- the choice ---- */

/* The widest span of exponents that can matter: the key's range and where it starts. */
static struct perta_grouping window_of(const struct perta_codec_kernels *kernels,
                                       struct perta_grouping e, unsigned width,
                                       struct perta_codec_sample *s, size_t n)
{
    e.first = e.e_bits > 8 ? (1u << (e.e_bits - 1)) - 192 : 0;
    e.n = 256;
    uint8_t top = 0;
    kernels->keys(width, &e, s->before, s->keys[0], n);
    for (size_t i = 0; i < n; i++)
        top = s->keys[0][i] > top ? s->keys[0][i] : top;
    e.first += top >= PERTA_WINDOW ? top - PERTA_WINDOW + 1u : 0;
    e.n = top >= PERTA_WINDOW ? PERTA_WINDOW : top + 1u;
    return e;
}

/* Groups from one floor up to the window's end; units below it join the lowest. */
static void choose_floor(struct perta_codec_sample *s,
                         const uint32_t crossing[PERTA_WINDOW], size_t n, bool exact,
                         struct perta_codec_plan *plan)
{
    struct perta_grouping *g = &plan->grouping;
    uint64_t costs[PERTA_WINDOW], above = 0, best = UINT64_MAX;
    uint8_t bits[PERTA_WINDOW], low_bits[PERTA_WINDOW];
    uint32_t n_crossers = 0, chosen = 0;
    uint64_t low[PERTA_WINDOW];
    uint32_t counts[256] = {0};
    for (uint32_t k = 0; k < g->n; k++) {
        for (unsigned v = 0; v < 256; v++)
            counts[v] += s->counts[k][v];
        low[k] = group_cost(counts, exact, &low_bits[k]);
        costs[k] = group_cost(s->counts[k], exact, &bits[k]);
    }
    for (uint32_t k = g->n; k-- > 0;) {
        uint32_t c = n_crossers ? n_crossers : 1;
        uint64_t cross = (uint64_t)c * (log2_256((uint32_t)n) - log2_256(c) + BITS(3));
        uint64_t cost = low[k] + above + cross;
        if (cost <= best) {
            best = cost;
            chosen = k;
        }
        above += costs[k] + BITS(160); /* tables, and time */
        n_crossers += crossing[k];
    }
    for (uint32_t k = chosen; k < g->n; k++)
        plan->bits[k - chosen] = k == chosen ? low_bits[k] : bits[k];
    g->first += chosen;
    g->n -= chosen;
}

/* Symbols of the sample, by exponent; larger exponent of each unit whose two differ. */
static void count_symbols(const struct perta_codec_kernels *kernels,
                          const struct perta_grouping *g, unsigned width,
                          struct perta_codec_sample *s, size_t n,
                          uint32_t crossing[PERTA_WINDOW])
{
    memset(s->counts, 0, g->n * sizeof *s->counts);
    if (!g->e_bits) {
        for (size_t i = 0; i < n; i++)
            s->counts[0][s->planes[i]]++;
        return;
    }
    kernels->keys(width, g, s->before, s->keys[0], n);
    kernels->keys(width, g, s->after, s->keys[1], n);
    for (size_t i = 0; i < n; i++) {
        uint8_t a = s->keys[0][i], b = s->keys[1][i];
        s->counts[a][s->planes[i]]++;
        crossing[a > b ? a : b] += a != b;
    }
}

void perta_codec_plan(const struct perta_codec_kernels *kernels, enum perta_dtype dtype,
                      const void *before, const void *after, size_t n_units,
                      struct perta_codec_sample *s, struct perta_codec_plan *plan)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    bool ordered = perta_codec_is_ordered(dtype);
    *plan = (struct perta_codec_plan){.grouping = perta_codec_exponent(dtype)};
    size_t n = take(before, width, n_units, s->before);
    take(after, width, n_units, s->after);
    kernels->delta(width, ordered, false, s->before, s->after, s->planes, n, n);
    plan->narrow = is_narrow(s, width, n);
    if (plan->narrow)
        kernels->delta(width, ordered, true, s->before, s->after, s->planes, n, n);
    else if (width > 1)
        to_symbols(s->planes, width, n);
    if (plan->grouping.e_bits)
        plan->grouping = window_of(kernels, plan->grouping, width, s, n);
    uint32_t crossing[PERTA_WINDOW] = {0};
    count_symbols(kernels, &plan->grouping, width, s, n, crossing);
    choose_floor(s, crossing, n, plan->narrow || width == 1, plan);
}
