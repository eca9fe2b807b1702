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
static bool gaps_are_sound(const uint8_t *gaps, size_t len_bytes, size_t n_crossers, size_t n)
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

static const char *read_sections(const uint8_t *at, const uint8_t *end, struct perta_layout *l)
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
static const char *read_values(struct perta_codec_scratch *s, size_t n, struct perta_layout *l)
{
    uint8_t *to = s->grouped;
    size_t stride = perta_grouped_stride(n);
    for (unsigned g = 0; g <= l->n_groups; g++) {
        size_t n_units = l->groups[g].n, n_rest = l->groups[g].n_rest;
        unsigned bits = l->groups[g].bits;
        uint8_t full = (uint8_t)((1u << bits) - 1);
        for (unsigned b = 0; b < l->value_bytes; b++)
            l->groups[g].values[b] = bits ? to + b * stride : l->groups[g].rest + b * n_rest;
        if (!bits)
            continue;
        s->kernels->unpack(bits, l->groups[g].fields, n_units, to);
        if (s->kernels->occurs(to, full, n_units) != n_rest)
            return "its fields make no sense";
        for (unsigned b = l->value_bytes; b-- > 0;) { /* the first plane holds the fields */
            if (b)
                memset(to + b * stride, 0, n_units);
            s->kernels->put(to + b * stride, to, full, n_units, l->groups[g].rest + b * n_rest);
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

/* The group of each unit of from, crossers by the gaps; do they have the sizes of the table? */
static bool find_groups(struct perta_codec_scratch *s, const struct perta_layout *l,
                        const uint8_t *from, size_t n)
{
    s->kernels->keys(l->width, &l->grouping, from, s->keys, n);
    size_t at = 0;
    for (size_t i = 0; i < l->gaps_bytes; i++) {
        at += l->gaps[i];
        if (l->gaps[i] != 255)
            s->keys[at++] = (uint8_t)l->n_groups;
    }
    uint32_t counts[PERTA_GROUPS_MAX + 1] = {0};
    perta_count_all(s->kernels, s->keys, n, l->n_groups + 1, counts);
    for (unsigned g = 0; g <= l->n_groups; g++)
        if (counts[g] != l->groups[g].n)
            return false;
    return true;
}

static void ungroup(struct perta_codec_scratch *s, const struct perta_layout *l, size_t n)
{
    for (unsigned b = 0; b < l->value_bytes; b++) {
        const uint8_t *values[PERTA_GROUPS_MAX + 1];
        for (unsigned g = 0; g <= l->n_groups; g++)
            values[g] = l->groups[g].values[b];
        s->kernels->gather(s->planes + b * n, s->keys, n, l->n_groups + 1, values);
    }
}

/* Units whose values overflow, in order. */
struct overflow {
    const uint8_t *from;
    uint8_t *units, *to;
    unsigned width;
    size_t n, room;
};

static void take_out(void *ctx, size_t unit)
{
    struct overflow *o = ctx;
    if (o->n < o->room)
        perta_unit_copy(o->units, o->n, o->from, unit, o->width);
    o->n++;
}

static void put_back(void *ctx, size_t unit)
{
    struct overflow *o = ctx;
    perta_unit_copy(o->to, unit, o->units, o->n++, o->width);
}

/* They are moved by themselves, one after another. */
static bool move_overflow(struct perta_codec_scratch *s, const struct perta_layout *l,
                          bool ordered, const uint8_t *values, const uint8_t *from, bool minus,
                          uint8_t *to, size_t n)
{
    struct overflow o = {from, s->fields, to, l->width, 0, l->n_overflow};
    perta_each(s->kernels, values, 255, n, take_out, &o);
    if (o.n != l->n_overflow)
        return false;
    s->kernels->add(l->width, ordered, false, o.units, l->overflow, o.n, minus, o.units, o.n);
    o.n = 0;
    perta_each(s->kernels, values, 255, n, put_back, &o);
    return true;
}

const char *perta_payload_move(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               const struct perta_layout *l, const uint8_t *from, bool minus,
                               uint8_t *to, size_t n)
{
    bool ordered = perta_codec_is_ordered(dtype), narrow = l->value_bytes < l->width;
    const uint8_t *values = s->planes;
    size_t stride = n;
    if (l->n_groups > 1) {
        if (!find_groups(s, l, from, n))
            return "its groups are not those of the values";
        ungroup(s, l, n);
    } else {
        if (l->groups[1].n)
            return "its groups make no sense";
        values = l->groups[0].values[0];
        stride = l->groups[0].bits ? perta_grouped_stride(n) : n;
    }
    s->kernels->add(l->width, ordered, narrow, from, values, stride, minus, to, n);
    if (narrow && !move_overflow(s, l, ordered, values, from, minus, to, n))
        return "what overflows makes no sense";
    return NULL;
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
