#include <string.h>

#include "io/codec_payload.h"

static uint32_t get_le(const uint8_t *from, unsigned bytes)
{
    uint32_t value = 0;
    for (unsigned b = 0; b < bytes; b++)
        value |= (uint32_t)from[b] << (8 * b);
    return value;
}

/* The gaps must be n_crossers numbers that lead to positions below n. */
static bool gaps_are_sound(const uint8_t *gaps, size_t len_bytes, size_t n_crossers,
                           size_t n)
{
    size_t at = 0, found = 0;
    for (size_t i = 0; i < len_bytes; i++) {
        at += gaps[i];
        if (gaps[i] == 255)
            continue;
        if (at >= n)
            return false;
        at++;
        found++;
    }
    return found == n_crossers && (!len_bytes || gaps[len_bytes - 1] != 255);
}

/* ---- the layout ---- */

/* Advances *at by count times each bytes, if there are so many before end. */
static bool skip(const uint8_t **at, const uint8_t *end, uint64_t count, unsigned each,
                 const uint8_t **start)
{
    *start = *at;
    if (count * each > (uint64_t)(end - *at))
        return false;
    *at += count * each;
    return true;
}

static const char *read_table(const uint8_t **at, const uint8_t *end, size_t n,
                              struct perta_layout *l)
{
    const uint8_t *table;
    uint64_t total = 0;
    if (!skip(at, end, l->n_groups + 1, PERTA_GROUP_BYTES, &table))
        return "it ends in its head";
    for (unsigned g = 0; g <= l->n_groups; g++, table += PERTA_GROUP_BYTES) {
        l->groups[g].n = get_le(table, 4);
        l->groups[g].n_rest = get_le(table + 4, 4);
        unsigned bits = l->groups[g].bits = table[8];
        if (bits > 4 || bits == 3 || l->groups[g].n_rest > l->groups[g].n ||
            (!bits && l->groups[g].n_rest != l->groups[g].n))
            return "its groups make no sense";
        total += l->groups[g].n;
    }
    return total == n ? NULL : "its groups make no sense";
}

static const char *read_sections(const uint8_t *at, const uint8_t *end,
                                 struct perta_layout *l)
{
    for (unsigned g = 0; g <= l->n_groups; g++)
        if (!skip(&at, end, perta_fields_bytes(l->groups[g].n, l->groups[g].bits), 1,
                  &l->groups[g].fields) ||
            !skip(&at, end, l->groups[g].n_rest, l->value_bytes, &l->groups[g].rest))
            return "it ends in a group";
    if (!skip(&at, end, l->n_overflow, l->width, &l->overflow) || at != end)
        return "it is not as long as it says";
    return NULL;
}

/* Values of each group from its fields and its rest. */
static const char *read_values(struct perta_codec_scratch *s, size_t n,
                               struct perta_layout *l)
{
    uint8_t *to = s->grouped;
    size_t stride = perta_grouped_stride(n);
    for (unsigned g = 0; g <= l->n_groups; g++) {
        size_t n_units = l->groups[g].n, n_rest = l->groups[g].n_rest;
        unsigned bits = l->groups[g].bits;
        uint8_t full = (uint8_t)((1u << bits) - 1);
        for (unsigned b = 0; b < l->value_bytes; b++)
            l->groups[g].values[b] =
                bits ? to + b * stride : l->groups[g].rest + b * n_rest;
        if (!bits)
            continue;
        s->kernels->unpack(bits, l->groups[g].fields, n_units, to);
        if (s->kernels->occurs(to, full, n_units) != n_rest)
            return "its fields make no sense";
        for (unsigned b = l->value_bytes; b-- > 0;) { /* the first plane holds the fields */
            if (b)
                memset(to + b * stride, 0, n_units);
            s->kernels->put(to + b * stride, to, full, n_units,
                            l->groups[g].rest + b * n_rest);
        }
        to += n_units + PERTA_KERNEL_SLACK;
    }
    return NULL;
}

const char *perta_payload_read(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               size_t payload_bytes, size_t n, struct perta_layout *l)
{
    const uint8_t *at = s->payload, *end = at + payload_bytes, *head;
    if (!skip(&at, end, 1, PERTA_HEAD_BYTES, &head))
        return "it ends in its head";
    l->width = perta_dtype_unit_bytes(dtype);
    l->n_groups = head[2];
    l->value_bytes = head[3];
    l->gaps_bytes = get_le(head + 4, 4);
    l->n_overflow = get_le(head + 8, 4);
    l->grouping = perta_codec_exponent(dtype);
    l->grouping.first = get_le(head, 2);
    l->grouping.n = l->n_groups;
    bool narrow = l->value_bytes < l->width;
    if (!l->n_groups || l->n_groups > PERTA_GROUPS_MAX ||
        (l->n_groups > 1 && l->grouping.first + l->n_groups > 1u << l->grouping.e_bits) ||
        (l->value_bytes != l->width && l->value_bytes != 1) || (l->n_overflow && !narrow))
        return "its head makes no sense";
    const char *wrong = read_table(&at, end, n, l);
    if (!wrong && !skip(&at, end, l->gaps_bytes, 1, &l->gaps))
        wrong = "it ends in its gaps";
    if (!wrong && !gaps_are_sound(l->gaps, l->gaps_bytes, l->groups[l->n_groups].n, n))
        wrong = "its gaps make no sense";
    if (!wrong)
        wrong = read_sections(at, end, l);
    return wrong ? wrong : read_values(s, n, l);
}

/* ---- moving ---- */

/* Where reading has come to. */
struct reader {
    const struct perta_codec_kernels *kernels;
    const struct perta_layout *l;
    bool ordered, minus;
    const uint8_t *gap, *overflow; /* the next of them */
    size_t crosser;                /* the next unit that crosses */
    const uint8_t
        *values[PERTA_UNIT_MAX][PERTA_GROUPS_MAX + 1]; /* the next, by plane and group */
    /* a tile's */
    const uint8_t *from;
    uint8_t *to;
    size_t n_overflow;
    uint8_t units[PERTA_TILE * PERTA_UNIT_MAX]; /* that overflow */
};

static void next_crosser(struct reader *r)
{
    const uint8_t *end = r->l->gaps + r->l->gaps_bytes;
    if (r->gap == end)
        r->crosser = SIZE_MAX;
    while (r->gap < end) {
        r->crosser += *r->gap;
        if (*r->gap++ != 255)
            break;
    }
}

/* Values of the n units from number at on, in planes n apart. False where the groups do not
 * have as many: then some were read that are not theirs, but no more than a tile. */
static bool gather_tile(struct reader *r, size_t at, size_t n, uint8_t *keys,
                        uint8_t *planes)
{
    const struct perta_layout *l = r->l;
    r->kernels->keys(l->width, &l->grouping, r->from, keys, n);
    while (r->crosser < at + n) {
        keys[r->crosser++ - at] = (uint8_t)l->n_groups;
        next_crosser(r);
    }
    for (unsigned b = 0; b < l->value_bytes; b++)
        r->kernels->gather(planes + b * n, keys, n, l->n_groups + 1, r->values[b]);
    for (unsigned g = 0; g <= l->n_groups; g++)
        if (r->values[0][g] > l->groups[g].values[0] + l->groups[g].n)
            return false;
    return true;
}

static void take_out(void *ctx, size_t unit)
{
    struct reader *r = ctx;
    perta_unit_copy(r->units, r->n_overflow++, r->from, unit, r->l->width);
}

static void put_back(void *ctx, size_t unit)
{
    struct reader *r = ctx;
    perta_unit_copy(r->to, unit, r->units, r->n_overflow++, r->l->width);
}

/* Units whose values overflow are moved by themselves, one after another. */
static bool move_overflow(struct reader *r, const uint8_t *values, size_t n)
{
    const struct perta_layout *l = r->l;
    r->n_overflow = 0;
    perta_each(r->kernels, values, 255, n, take_out, r);
    size_t found = r->n_overflow;
    if (found > l->n_overflow - (size_t)(r->overflow - l->overflow))
        return false;
    r->kernels->add(l->width, r->ordered, false, r->units, r->overflow, l->n_overflow,
                    r->minus, r->units, found);
    r->overflow += found;
    r->n_overflow = 0;
    perta_each(r->kernels, values, 255, n, put_back, r);
    return true;
}

static void start_reader(struct reader *r, const struct perta_codec_scratch *s,
                         enum perta_dtype dtype, const struct perta_layout *l, bool minus)
{
    r->kernels = s->kernels;
    r->l = l;
    r->ordered = perta_codec_is_ordered(dtype);
    r->minus = minus;
    r->gap = l->gaps;
    r->overflow = l->overflow;
    r->crosser = 0;
    next_crosser(r);
    for (unsigned b = 0; b < l->value_bytes; b++)
        for (unsigned g = 0; g <= l->n_groups; g++)
            r->values[b][g] = l->groups[g].values[b];
}

const char *perta_payload_move(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               const struct perta_layout *l, const uint8_t *from,
                               bool minus, uint8_t *to, size_t n)
{
    struct reader r;
    bool narrow = l->value_bytes < l->width;
    size_t stride = l->groups[0].bits ? perta_grouped_stride(n) : n;
    if (l->n_groups == 1 && l->groups[1].n)
        return "its groups make no sense";
    start_reader(&r, s, dtype, l, minus);
    for (size_t at = 0; at < n; at += PERTA_TILE) {
        size_t len = n - at < PERTA_TILE ? n - at : PERTA_TILE;
        const uint8_t *values = l->groups[0].values[0] + at;
        r.from = from + at * l->width;
        r.to = to + at * l->width;
        if (l->n_groups > 1) {
            if (!gather_tile(&r, at, len, s->keys, s->planes))
                return "its groups are not those of the values";
            values = s->planes;
            stride = len;
        }
        s->kernels->add(l->width, r.ordered, narrow, r.from, values, stride, minus, r.to,
                        len);
        if (narrow && !move_overflow(&r, values, len))
            return "what overflows makes no sense";
    }
    return r.overflow == l->overflow + l->n_overflow ? NULL
                                                     : "what overflows makes no sense";
}

uint64_t perta_payload_changed(const struct perta_layout *l)
{
    uint64_t n_changed = 0;
    for (unsigned g = 0; g <= l->n_groups; g++) {
        size_t n = l->groups[g].n;
        for (size_t i = 0; i < n; i++) {
            unsigned any = 0;
            for (unsigned b = 0; b < l->value_bytes; b++)
                any |= l->groups[g].values[b][i];
            n_changed += any != 0;
        }
    }
    return n_changed;
}
