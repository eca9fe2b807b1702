#include <string.h>

#include "io/codec_payload.h"

/* More values than one in so many that do not fit a byte make all of them wide. */
#define OVERFLOW_SHARE 16

#define CROSSER_SHARE 16 /* the same for units that cross */

/* A chunk on its way. */
struct chunk {
    struct perta_codec_scratch *s;
    enum perta_dtype dtype;
    const uint8_t *before, *after;
    size_t n;
    struct perta_codec_plan plan;
    unsigned width, value_bytes;
    size_t n_overflow, overflow_max;
    uint32_t counts[PERTA_GROUPS_MAX + 1]; /* units of each group, crossers last */
    const uint8_t *overflow;               /* (n_overflow) planes */
    uint8_t *end;                          /* of what stands in s->payload */
    struct perta_sections *sections;
};

static void put_le(uint8_t *to, uint64_t value, unsigned bytes)
{
    for (unsigned b = 0; b < bytes; b++)
        to[b] = (uint8_t)(value >> (8 * b));
}

static void add_section(struct chunk *c, const uint8_t *bytes, size_t len_bytes)
{
    if (!len_bytes)
        return;
    c->sections->all[c->sections->n++] = (struct perta_section){bytes, len_bytes};
    c->sections->len_bytes += len_bytes;
}

/* ---- values and groups ---- */

/* Units whose values overflow, both sides: in s->fields, room for n_overflow_max each. */
struct overflow {
    const struct chunk *c;
    const uint8_t *before, *after;
    size_t n;
};

static void add_overflow(void *ctx, size_t unit)
{
    struct overflow *o = ctx;
    unsigned width = o->c->width;
    if (o->n < o->c->overflow_max) {
        perta_unit_copy(o->c->s->fields, o->n, o->before, unit, width);
        perta_unit_copy(o->c->s->fields + o->c->overflow_max * width, o->n, o->after, unit,
                        width);
    }
    o->n++;
}

/* Values, keys and what is counted of them, tile by tile, while both sides are in the
 * cache. */
static uint64_t take_values(struct chunk *c)
{
    struct perta_codec_scratch *s = c->s;
    const struct perta_grouping *g = &c->plan.grouping;
    bool ordered = perta_codec_is_ordered(c->dtype);
    uint64_t n_changed = 0;
    uint8_t other[PERTA_TILE];
    c->value_bytes = c->plan.narrow ? 1 : c->width;
    struct overflow overflow = {.c = c};
    memset(c->counts, 0, sizeof c->counts);
    for (size_t at = 0; at < c->n; at += PERTA_TILE) {
        size_t len = c->n - at < PERTA_TILE ? c->n - at : PERTA_TILE;
        const uint8_t *before = c->before + at * c->width,
                      *after = c->after + at * c->width;
        n_changed += s->kernels->delta(c->width, ordered, c->plan.narrow, before, after,
                                       s->planes + at, c->n, len);
        if (c->plan.narrow) {
            overflow.before = before;
            overflow.after = after;
            perta_each(s->kernels, s->planes + at, 255, len, add_overflow, &overflow);
        }
        if (g->n > 1) {
            s->kernels->keys(c->width, g, before, s->keys + at, len);
            s->kernels->keys(c->width, g, after, other, len);
            s->kernels->cross(s->keys + at, other, (uint8_t)g->n, len);
            s->kernels->count(s->keys + at, len, g->n + 1, c->counts);
        }
    }
    c->n_overflow = overflow.n;
    return n_changed;
}

/* Against what the sample says there may be too much that is listed one by one. */
static uint64_t take_chunk(struct chunk *c)
{
    struct perta_grouping *g = &c->plan.grouping;
    uint64_t n_changed = take_values(c);
    if (c->n_overflow > c->overflow_max) {
        c->plan.narrow = false;
        n_changed = take_values(c);
    }
    if (g->n > 1 && c->counts[g->n] > c->n / CROSSER_SHARE)
        g->n = 1;
    if (g->n == 1) {
        c->counts[0] = (uint32_t)c->n;
        c->counts[1] = 0;
    }
    return n_changed;
}

struct gaps {
    uint8_t *end;
    size_t from;
};

static void add_gap(void *ctx, size_t unit)
{
    struct gaps *gaps = ctx;
    size_t gap = unit - gaps->from;
    for (; gap >= 255; gap -= 255)
        *gaps->end++ = 255;
    *gaps->end++ = (uint8_t)gap;
    gaps->from = unit + 1;
}

/* Values by group, in s->grouped. */
static void group_values(struct chunk *c)
{
    struct perta_codec_scratch *s = c->s;
    unsigned n_keys = c->plan.grouping.n + 1;
    for (unsigned b = 0; b < c->value_bytes; b++) {
        uint8_t *to[PERTA_GROUPS_MAX + 1];
        to[0] = s->grouped + b * perta_grouped_stride(c->n);
        for (unsigned g = 1; g < n_keys; g++)
            to[g] = to[g - 1] + c->counts[g - 1] + PERTA_KERNEL_SLACK;
        s->kernels->scatter(s->planes + b * c->n, s->keys, c->n, n_keys, to);
    }
}

/* ---- the payload ---- */

/* Fields and rest of n values, planes stride apart; 0 bits where fields save nothing. */
static uint32_t write_group(struct chunk *c, const uint8_t *values, size_t stride, size_t n,
                            uint8_t *bits)
{
    struct perta_codec_scratch *s = c->s;
    uint8_t *start = c->end;
    uint32_t n_rest = 0;
    if (*bits) {
        uint8_t full = (uint8_t)((1u << *bits) - 1);
        s->kernels->clamp(values, stride, c->value_bytes, full, s->fields, n);
        n_rest = (uint32_t)s->kernels->occurs(s->fields, full, n);
        size_t fields_bytes = perta_fields_bytes(n, *bits);
        if (fields_bytes + (size_t)n_rest * c->value_bytes < n * c->value_bytes) {
            s->kernels->pack(*bits, s->fields, n, start);
            add_section(c, start, fields_bytes);
            c->end += fields_bytes;
            for (unsigned b = 0; b < c->value_bytes; b++) {
                s->kernels->pick(values + b * stride, s->fields, full, n, c->end);
                add_section(c, c->end, n_rest);
                c->end += n_rest;
            }
            return n_rest;
        }
    }
    *bits = 0;
    for (unsigned b = 0; b < c->value_bytes; b++)
        add_section(c, values + b * stride, n);
    return (uint32_t)n;
}

static void write_groups(struct chunk *c, uint8_t *table)
{
    bool grouped = c->plan.grouping.n > 1;
    size_t stride = grouped ? perta_grouped_stride(c->n) : c->n;
    const uint8_t *values = grouped ? c->s->grouped : c->s->planes;
    for (unsigned g = 0; g <= c->plan.grouping.n; g++) {
        uint32_t n = c->counts[g];
        uint32_t n_rest = write_group(c, values, stride, n, &c->plan.bits[g]);
        put_le(table, n, 4);
        put_le(table + 4, n_rest, 4);
        table[8] = c->plan.bits[g];
        table += PERTA_GROUP_BYTES;
        values += n + PERTA_KERNEL_SLACK;
    }
}

/* z of the units that overflow, into s->payload before fields need their room. */
static void write_overflow(struct chunk *c)
{
    c->overflow = c->end;
    c->s->kernels->delta(c->width, perta_codec_is_ordered(c->dtype), false, c->s->fields,
                         c->s->fields + c->overflow_max * c->width, c->end, c->n_overflow,
                         c->n_overflow);
    c->end += c->n_overflow * c->width;
}

uint64_t perta_payload_write(struct perta_codec_scratch *s, enum perta_dtype dtype,
                             const uint8_t *before, const uint8_t *after, size_t n,
                             struct perta_sections *sections)
{
    struct chunk c = {
        .s = s,
        .dtype = dtype,
        .before = before,
        .after = after,
        .n = n,
        .width = perta_dtype_unit_bytes(dtype),
        .overflow_max = n / OVERFLOW_SHARE,
        .sections = sections,
    };
    sections->n = 0;
    sections->len_bytes = 0;
    struct perta_codec_sample sample = {
        s->grouped, s->payload, s->planes, {s->keys, s->fields}, s->counts};
    perta_codec_plan(s->kernels, dtype, before, after, n, &sample, &c.plan);
    uint64_t n_changed = take_chunk(&c);
    if (!n_changed)
        return 0;
    const struct perta_grouping *g = &c.plan.grouping;
    uint8_t *head = s->payload, *table = head + PERTA_HEAD_BYTES;
    uint8_t *gaps = table + (g->n + 1) * PERTA_GROUP_BYTES;
    c.end = gaps;
    if (g->n > 1) {
        struct gaps crossers = {gaps, 0};
        perta_each(s->kernels, s->keys, (uint8_t)g->n, n, add_gap, &crossers);
        c.end = crossers.end;
        group_values(&c);
    }
    put_le(head, g->first, 2);
    head[2] = (uint8_t)g->n;
    head[3] = (uint8_t)c.value_bytes;
    put_le(head + 4, (uint64_t)(c.end - gaps), 4);
    put_le(head + 8, c.n_overflow, 4);
    add_section(&c, head, (size_t)(c.end - head));
    write_overflow(&c);
    write_groups(&c, table);
    for (unsigned b = 0; b < c.width; b++)
        add_section(&c, c.overflow + b * c.n_overflow, c.n_overflow);
    return n_changed;
}
