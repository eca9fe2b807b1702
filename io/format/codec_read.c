#include <string.h>

#include "io/format/codec_payload.h"

static uint32_t get_le(const uint8_t *from, unsigned bytes)
{
    uint32_t value = 0;
    for (unsigned b = 0; b < bytes; b++)
        value |= (uint32_t)from[b] << (8 * b);
    return value;
}

/* Are the gaps n_crossers numbers that lead to positions below n? */
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

/* Advance *at by count * each bytes. False if fewer are left before end. */
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

static const char *read_sections(const uint8_t *at, const uint8_t *end, size_t n,
                                 struct perta_layout *l, const uint8_t **packed)
{
    for (unsigned b = 0; b < l->low / 8; b++)
        if (!skip(&at, end, n, 1, &l->lows[b]))
            return "it ends in its low bits";
    if (!skip(&at, end, perta_fields_bytes(n, l->low % 8), 1, packed))
        return "it ends in its low bits";
    for (unsigned g = 0; g <= l->n_groups; g++)
        if (!skip(&at, end, perta_fields_bytes(l->groups[g].n, l->groups[g].bits), 1,
                  &l->groups[g].fields) ||
            !skip(&at, end, l->groups[g].n_rest, 1, &l->groups[g].rest))
            return "it ends in a group";
    if (!skip(&at, end, l->n_overflow, perta_high_bytes(l->width, l->low), &l->overflow) ||
        at != end)
        return "it is not as long as it says";
    return NULL;
}

/* Compute the values of each group from its fields and its rest. */
static const char *read_values(struct perta_codec_scratch *s, struct perta_layout *l)
{
    uint8_t *to = s->grouped;
    for (unsigned g = 0; g <= l->n_groups; g++) {
        size_t n_units = l->groups[g].n;
        unsigned bits = l->groups[g].bits;
        uint8_t full = (uint8_t)((1u << bits) - 1);
        l->groups[g].values = bits ? to : l->groups[g].rest;
        if (!bits)
            continue;
        s->kernels->unpack(bits, l->groups[g].fields, n_units, to);
        if (s->kernels->at_least(to, full, n_units) != l->groups[g].n_rest)
            return "its fields make no sense";
        s->kernels->put(to, full, n_units, l->groups[g].rest);
        to += n_units + PERTA_KERNEL_SLACK;
    }
    return NULL;
}

static const char *read_head(const uint8_t *head, enum perta_dtype dtype, size_t n,
                             struct perta_layout *l)
{
    l->width = perta_dtype_unit_bytes(dtype);
    l->n_groups = head[2];
    l->low = head[3];
    l->gaps_bytes = get_le(head + 4, 4);
    l->n_overflow = get_le(head + 8, 4);
    l->n_changed = get_le(head + 12, 4);
    l->grouping = perta_codec_exponent(dtype);
    l->grouping.first = get_le(head, 2);
    l->grouping.n = l->n_groups;
    unsigned left = l->low % 8;
    if (!l->n_groups || l->n_groups > PERTA_GROUPS_MAX ||
        (l->n_groups > 1 && l->grouping.first + l->n_groups > 1u << l->grouping.e_bits) ||
        l->low > 8 * l->width || (left & (left - 1)) || l->n_changed > n)
        return "its head makes no sense";
    return NULL;
}

const char *perta_payload_read(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               size_t payload_bytes, size_t n, struct perta_layout *l)
{
    const uint8_t *at = s->payload, *end = at + payload_bytes, *head, *packed = NULL;
    if (!skip(&at, end, 1, PERTA_HEAD_BYTES, &head))
        return "it ends in its head";
    const char *wrong = read_head(head, dtype, n, l);
    if (!wrong)
        wrong = read_table(&at, end, n, l);
    if (!wrong && !skip(&at, end, l->gaps_bytes, 1, &l->gaps))
        wrong = "it ends in its gaps";
    if (!wrong && !gaps_are_sound(l->gaps, l->gaps_bytes, l->groups[l->n_groups].n, n))
        wrong = "its gaps make no sense";
    if (!wrong)
        wrong = read_sections(at, end, n, l, &packed);
    if (wrong)
        return wrong;
    if (l->low % 8) {
        s->kernels->unpack(l->low % 8, packed, n, s->spare);
        l->lows[l->low / 8] = s->spare;
    }
    return read_values(s, l);
}

/* ---- apply and revert ---- */

/* The reading position. */
struct reader {
    const struct perta_codec_kernels *kernels;
    const struct perta_layout *l;
    const uint8_t *gap;                          /* the next gap */
    size_t crosser;                              /* the unit that gap counts from */
    const uint8_t *values[PERTA_GROUPS_MAX + 1]; /* the next value, by group */
    size_t overflow;                             /* index of the next unit that overflows */
    bool too_low;                                /* one of them should not have overflowed */
    uint8_t z[PERTA_TILE * PERTA_UNIT_MAX];      /* of a tile */
};

/* Set the key of every crosser up to unit end. */
static void mark_crossers(struct reader *r, size_t at, size_t end, uint8_t *keys)
{
    const uint8_t *gap = r->gap, *gaps_end = r->l->gaps + r->l->gaps_bytes;
    size_t crosser = r->crosser;
    for (; gap < gaps_end && crosser + *gap < end; gap++) {
        crosser += *gap;
        if (*gap != 255)
            keys[crosser++ - at] = (uint8_t)r->l->n_groups;
    }
    r->gap = gap;
    r->crosser = crosser;
}

/* Gather the values of the n units from unit `at` on. False if a group has too few values; then at
 * most a tile beyond it was read. */
static bool gather_tile(struct reader *r, const uint8_t *from, size_t at, size_t n, uint8_t *keys,
                        uint8_t *values)
{
    const struct perta_layout *l = r->l;
    r->kernels->keys(l->width, &l->grouping, from, keys, n);
    mark_crossers(r, at, at + n, keys);
    r->kernels->gather(values, keys, n, l->n_groups + 1, r->values);
    for (unsigned g = 0; g <= l->n_groups; g++)
        if (r->values[g] > l->groups[g].values + l->groups[g].n)
            return false;
    return true;
}

/* Insert the high parts of the units in r->z whose values overflow. */
static void put_overflow(struct reader *r, const uint8_t *values, size_t n)
{
    const struct perta_layout *l = r->l;
    uint16_t at[PERTA_TILE_FOUND];
    size_t found = r->kernels->find(values, 255, n, at);
    unsigned n_planes = perta_high_bytes(l->width, l->low);
    for (size_t i = 0; i < found; i++, r->overflow++) {
        uint64_t high = 0, z = perta_unit_get(r->z, at[i], l->width);
        for (unsigned b = 0; b < n_planes && r->overflow < l->n_overflow; b++)
            high |= (uint64_t)l->overflow[b * l->n_overflow + r->overflow] << (8 * b);
        r->too_low |= high < 255;
        z = (z & ((1ull << l->low) - 1)) | high << l->low;
        perta_unit_put(r->z, at[i], z, l->width);
    }
}

static void start_reader(struct reader *r, const struct perta_codec_scratch *s,
                         const struct perta_layout *l)
{
    r->kernels = s->kernels;
    r->l = l;
    r->gap = l->gaps;
    r->crosser = 0;
    r->overflow = 0;
    r->too_low = false;
    for (unsigned g = 0; g <= l->n_groups; g++)
        r->values[g] = l->groups[g].values;
}

/* Compute z of the n units from unit `at` on, into r->z. Returns how many are not zero. */
static uint64_t join_tile(struct reader *r, const uint8_t *values, size_t at, size_t n)
{
    const struct perta_layout *l = r->l;
    const uint8_t *lows[PERTA_UNIT_MAX];
    for (unsigned b = 0; 8 * b < l->low; b++)
        lows[b] = l->lows[b] + at;
    uint64_t n_changed = r->kernels->join(l->width, l->low, values, lows, r->z, n);
    if (l->low < 8 * l->width)
        put_overflow(r, values, n);
    return n_changed;
}

const char *perta_payload_move(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               const struct perta_layout *l, const uint8_t *from, bool minus,
                               uint8_t *to, size_t n)
{
    struct reader r;
    bool ordered = perta_codec_is_ordered(dtype);
    uint64_t n_changed = 0;
    if (l->n_groups == 1 && l->groups[1].n)
        return "its groups make no sense";
    start_reader(&r, s, l);
    for (size_t at = 0; at < n; at += PERTA_TILE) {
        size_t len = n - at < PERTA_TILE ? n - at : PERTA_TILE;
        const uint8_t *values = l->groups[0].values + at;
        if (l->n_groups > 1) {
            if (!gather_tile(&r, from + at * l->width, at, len, s->keys, s->planes))
                return "its groups are not those of the values";
            values = s->planes;
        }
        n_changed += join_tile(&r, values, at, len);
        s->kernels->add(l->width, ordered, from + at * l->width, r.z, minus, to + at * l->width,
                        len);
    }
    if (r.overflow != l->n_overflow || r.too_low)
        return "what overflows makes no sense";
    return n_changed == l->n_changed ? NULL : "it does not change as many units as it says";
}
