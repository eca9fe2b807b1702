#include <string.h>

#include "io/format/codec_payload.h"

#define CROSSER_SHARE 8 /* no groups if more than one unit in so many crosses */

/* A chunk that is being encoded. */
struct chunk {
    struct perta_codec_scratch *s;
    enum perta_dtype dtype;
    const uint8_t *before, *after;
    size_t n;
    struct perta_codec_plan plan;
    unsigned width;
    uint8_t *values;               /* (n) */
    uint8_t *lows[PERTA_UNIT_MAX]; /* (n) */
    size_t n_overflow, overflow_max;
    uint32_t counts[PERTA_GROUPS_MAX + 1]; /* units in each group, crossers last */
    const uint8_t *overflow;               /* (n_overflow) planes */
    uint8_t *end;                          /* end of what is in s->payload so far */
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

/* Store z >> low of the units whose values overflow, as units, in s->spare. */
static void take_overflow(struct chunk *c, const uint8_t *z, const uint8_t *values, size_t n)
{
    uint16_t at[PERTA_TILE_FOUND];
    size_t found = c->s->kernels->find(values, 255, n, at);
    for (size_t i = 0; i < found && c->n_overflow + i < c->overflow_max; i++)
        perta_unit_put(c->s->spare, c->n_overflow + i,
                       perta_unit_get(z, at[i], c->width) >> c->plan.low, c->width);
    c->n_overflow += found;
}

/* Compute values, low bits, keys and counts of the n units from unit `at` on. Returns how many
 * units change. */
static uint64_t take_tile(struct chunk *c, size_t at, size_t n)
{
    const struct perta_codec_kernels *k = c->s->kernels;
    const struct perta_grouping *g = &c->plan.grouping;
    const uint8_t *before = c->before + at * c->width, *after = c->after + at * c->width;
    uint8_t z[PERTA_TILE * PERTA_UNIT_MAX], other[PERTA_TILE], *lows[PERTA_UNIT_MAX];
    uint64_t n_changed =
        k->zigzags(c->width, perta_codec_is_ordered(c->dtype), before, after, z, n);
    for (unsigned b = 0; b < c->width; b++)
        lows[b] = c->lows[b] + at;
    k->split(c->width, c->plan.low, z, n, lows, c->values + at);
    take_overflow(c, z, c->values + at, n);
    if (g->n > 1) {
        k->keys(c->width, g, before, c->s->keys + at, n);
        k->keys(c->width, g, after, other, n);
        k->cross(c->s->keys + at, other, (uint8_t)g->n, n);
        k->count(c->s->keys + at, n, g->n + 1, c->counts);
    }
    return n_changed;
}

/* Process the chunk tile by tile, so that both sides stay in the cache. */
static uint64_t take_chunk(struct chunk *c)
{
    struct perta_codec_scratch *s = c->s;
    bool raw = c->plan.low == 8 * c->width;
    uint64_t n_changed = 0;
    c->n_overflow = 0;
    memset(c->counts, 0, sizeof c->counts);
    c->values = raw ? s->grouped : s->planes;
    for (unsigned b = 0; b < c->width; b++)
        c->lows[b] = b < c->plan.low / 8 ? s->planes + (b + !raw) * c->n : s->grouped;
    for (size_t at = 0; at < c->n; at += PERTA_TILE)
        n_changed += take_tile(c, at, c->n - at < PERTA_TILE ? c->n - at : PERTA_TILE);
    if (c->plan.grouping.n > 1 && c->counts[c->plan.grouping.n] > c->n / CROSSER_SHARE)
        c->plan.grouping.n = 1;
    if (c->plan.grouping.n == 1) {
        c->counts[0] = (uint32_t)c->n;
        c->counts[1] = 0;
    }
    return n_changed;
}

/* Sort the values by group, into s->grouped. */
static void group_values(struct chunk *c)
{
    uint8_t *to[PERTA_GROUPS_MAX + 1] = {c->s->grouped};
    unsigned n_keys = c->plan.grouping.n + 1;
    for (unsigned g = 1; g < n_keys; g++)
        to[g] = to[g - 1] + c->counts[g - 1] + PERTA_KERNEL_SLACK;
    c->s->kernels->scatter(c->values, c->s->keys, c->n, n_keys, to);
    c->values = c->s->grouped;
}

/* ---- the payload ---- */

static void write_gaps(struct chunk *c)
{
    uint16_t at[PERTA_TILE_FOUND];
    const uint8_t *keys = c->s->keys;
    size_t from = 0; /* the unit after the last crosser */
    for (size_t tile = 0; c->plan.grouping.n > 1 && tile < c->n; tile += PERTA_TILE) {
        size_t len = c->n - tile < PERTA_TILE ? c->n - tile : PERTA_TILE;
        size_t found = c->s->kernels->find(keys + tile, (uint8_t)c->plan.grouping.n, len, at);
        for (size_t i = 0; i < found; i++) {
            size_t gap = tile + at[i] - from;
            for (; gap >= 255; gap -= 255)
                *c->end++ = 255;
            *c->end++ = (uint8_t)gap;
            from = tile + at[i] + 1;
        }
    }
}

/* Write the low bits: whole bytes as they are, the remaining bits packed into fields. */
static void write_lows(struct chunk *c)
{
    unsigned n_bytes = c->plan.low / 8, bits = c->plan.low % 8;
    for (unsigned b = 0; b < n_bytes; b++)
        add_section(c, c->lows[b], c->n);
    if (!bits)
        return;
    c->s->kernels->pack(bits, c->lows[n_bytes], c->n, c->end);
    add_section(c, c->end, perta_fields_bytes(c->n, bits));
    c->end += perta_fields_bytes(c->n, bits);
}

/* Turn the units that overflow into planes, before the fields need that room. */
static void write_overflow(struct chunk *c)
{
    uint8_t *lows[PERTA_UNIT_MAX];
    unsigned n_planes = perta_high_bytes(c->width, c->plan.low);
    if (!c->n_overflow)
        return;
    for (unsigned b = 0; b < c->width; b++)
        lows[b] = c->end + b * c->n_overflow;
    c->overflow = c->end;
    c->end += n_planes * c->n_overflow; /* split's values go here; they are not used */
    c->s->kernels->split(c->width, 8 * n_planes, c->s->spare, c->n_overflow, lows, c->end);
}

/* Write fields and rest of n values; *bits becomes 0 if fields save nothing. */
static uint32_t write_group(struct chunk *c, const uint8_t *values, size_t n, uint8_t *bits)
{
    const struct perta_codec_kernels *k = c->s->kernels;
    uint8_t full = (uint8_t)((1u << *bits) - 1);
    size_t fields_bytes = perta_fields_bytes(n, *bits), n_rest = k->at_least(values, full, n);
    if (fields_bytes + n_rest >= n) {
        *bits = 0;
        add_section(c, values, n);
        return (uint32_t)n;
    }
    k->pack(*bits, values, n, c->end);
    add_section(c, c->end, fields_bytes);
    c->end += fields_bytes;
    k->pick(values, full, n, c->end);
    add_section(c, c->end, n_rest);
    c->end += n_rest;
    return (uint32_t)n_rest;
}

static void write_groups(struct chunk *c, uint8_t *table)
{
    const uint8_t *values = c->values;
    for (unsigned g = 0; g <= c->plan.grouping.n; g++) {
        uint32_t n = c->counts[g];
        uint32_t n_rest = write_group(c, values, n, &c->plan.bits[g]);
        put_le(table, n, 4);
        put_le(table + 4, n_rest, 4);
        table[8] = c->plan.bits[g];
        table += PERTA_GROUP_BYTES;
        values += n + PERTA_KERNEL_SLACK;
    }
}

static void write_payload(struct chunk *c, uint64_t n_changed)
{
    const struct perta_grouping *g = &c->plan.grouping;
    uint8_t *head = c->s->payload, *table = head + PERTA_HEAD_BYTES;
    uint8_t *gaps = table + (g->n + 1) * (size_t)PERTA_GROUP_BYTES;
    c->sections->n = 0;
    c->sections->len_bytes = 0;
    c->end = gaps;
    write_gaps(c);
    put_le(head, g->first, 2);
    head[2] = (uint8_t)g->n;
    head[3] = c->plan.low;
    put_le(head + 4, (uint64_t)(c->end - gaps), 4);
    put_le(head + 8, c->n_overflow, 4);
    put_le(head + 12, n_changed, 4);
    add_section(c, head, (size_t)(c->end - head));
    write_lows(c);
    write_overflow(c);
    if (g->n > 1)
        group_values(c);
    write_groups(c, table);
    for (unsigned b = 0; b < perta_high_bytes(c->width, c->plan.low); b++)
        add_section(c, c->overflow + b * c->n_overflow, c->n_overflow);
}

/* Size of a payload that consists of low bits only. */
static size_t raw_bytes(unsigned width, size_t n)
{
    return PERTA_HEAD_BYTES + 2 * PERTA_GROUP_BYTES + n * width + perta_fields_bytes(n, 1);
}

/* The most units that may overflow: with these the payload's room still holds gaps, low bits,
 * groups and overflow. */
static size_t overflow_max(unsigned width, size_t n)
{
    return width == 1 ? n / 16 : (9 * width - 14) * (n / 8) / width;
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
        .overflow_max = overflow_max(perta_dtype_unit_bytes(dtype), n),
        .sections = sections,
    };
    struct perta_codec_sample sample = {.before = s->grouped,
                                        .after = s->payload,
                                        .z = s->planes,
                                        .values = s->spare,
                                        .keys = s->keys,
                                        .counts = s->counts};
    perta_codec_plan(s->kernels, dtype, before, after, n, &sample, &c.plan);
    uint64_t n_changed = take_chunk(&c);
    if (!n_changed)
        return 0;
    if (c.n_overflow <= c.overflow_max)
        write_payload(&c, n_changed);
    if (c.n_overflow > c.overflow_max || sections->len_bytes > raw_bytes(c.width, n)) {
        perta_codec_plan_raw(dtype, &c.plan); /* the sample was not typical */
        take_chunk(&c);
        write_payload(&c, n_changed);
    }
    return n_changed;
}
