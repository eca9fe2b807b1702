/* codec_payload.h - the payload of one chunk, which codec.c wraps into a zstd frame. Internal to
 * io/format. Spec: docs/patch-format.md, "The payload". */
#ifndef PERTA_IO_FORMAT_CODEC_PAYLOAD_H
#define PERTA_IO_FORMAT_CODEC_PAYLOAD_H

#include <string.h>

#include "io/format/codec_plan.h"

#define PERTA_UNIT_MAX 8u /* bytes */
#define PERTA_HEAD_BYTES 16u
#define PERTA_GROUP_BYTES 9u
/* Sections: head and gaps, low bits, fields and rest of each group, overflow. */
#define PERTA_SECTIONS_MAX (1 + PERTA_UNIT_MAX + 2 * (PERTA_GROUPS_MAX + 1) + PERTA_UNIT_MAX)

/* Units that are processed at a time: what is read and computed of them stays in the L1 cache. */
#define PERTA_TILE 4096u
/* Room for the places within a tile that find() may write. */
#define PERTA_TILE_FOUND (PERTA_TILE + PERTA_KERNEL_SLACK)

/* Scratch memory, laid out by codec.c. Each part is PERTA_KERNEL_SLACK bytes larger than stated. */
struct perta_codec_scratch {
    const struct perta_codec_kernels *kernels;
    size_t max_bytes; /* of a chunk */
    uint8_t *planes;  /* (max_bytes) values in order of the units, then their low bytes */
    uint8_t *grouped; /* (perta_grouped_room(max_bytes)) values by group, crossers last */
    uint8_t *keys;    /* (max_bytes / 2) the group of each unit, if there are groups */
    uint8_t *spare;   /* (max_bytes) units that overflow; a sample's values; low bits */
    uint8_t *payload; /* (perta_codec_payload_max(max_bytes)) */
    uint32_t (*counts)[PERTA_WINDOW][256]; /* (2) */
};

/* With room between groups, for kernels that write past an end. */
static inline size_t perta_grouped_room(size_t n_bytes)
{
    return n_bytes + (PERTA_GROUPS_MAX + 2) * PERTA_KERNEL_SLACK;
}

/* How many byte planes the rest of a unit takes, without its low bits. */
static inline unsigned perta_high_bytes(unsigned width, unsigned low)
{
    return (8 * width - low + 7) / 8;
}

/* Bytes that n fields take. */
static inline size_t perta_fields_bytes(size_t n, unsigned bits)
{
    return (n * bits + 7) / 8;
}

static inline uint64_t perta_unit_get(const uint8_t *from, size_t i, unsigned width)
{
    uint64_t unit = 0;
    if (width == 2)
        memcpy(&unit, from + 2 * i, 2);
    else if (width == 4)
        memcpy(&unit, from + 4 * i, 4);
    else
        memcpy(&unit, from + width * i, width);
    return unit;
}

static inline void perta_unit_put(uint8_t *to, size_t i, uint64_t unit, unsigned width)
{
    if (width == 2)
        memcpy(to + 2 * i, &unit, 2);
    else if (width == 4)
        memcpy(to + 4 * i, &unit, 4);
    else
        memcpy(to + width * i, &unit, width);
}

struct perta_section {
    const uint8_t *bytes;
    size_t len_bytes;
};

/* A payload as a list of sections, borrowed from the scratch memory. */
struct perta_sections {
    struct perta_section all[PERTA_SECTIONS_MAX];
    unsigned n;
    size_t len_bytes; /* of all */
};

/* Write the payload of the change of n units. Returns how many units change; if 0, there is no
 * payload. */
uint64_t perta_payload_write(struct perta_codec_scratch *s, enum perta_dtype dtype,
                             const uint8_t *before, const uint8_t *after, size_t n,
                             struct perta_sections *sections);

/* A parsed payload (s->payload). Pointers lead into it and into s->grouped and s->spare. */
struct perta_layout {
    unsigned width, low, n_groups;
    struct perta_grouping grouping;
    struct {
        uint32_t n, n_rest;
        unsigned bits;
        const uint8_t *fields, *rest;    /* rest (n_rest) */
        const uint8_t *values;           /* (n) */
    } groups[PERTA_GROUPS_MAX + 1];      /* crossers last */
    const uint8_t *gaps, *overflow;      /* overflow (n_overflow) a plane */
    const uint8_t *lows[PERTA_UNIT_MAX]; /* (n) low bits, as perta_codec_kernels.join takes them */
    size_t gaps_bytes, n_overflow;
    uint64_t n_changed;
};

/* Parse the payload. Returns NULL, or what is wrong with it. */
const char *perta_payload_read(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               size_t payload_bytes, size_t n, struct perta_layout *layout);
/* Add the deltas to from (n), or subtract them (minus), into to (n). Returns NULL, or what is
 * wrong: from may not be what the payload was made from. */
const char *perta_payload_move(struct perta_codec_scratch *s, enum perta_dtype dtype,
                               const struct perta_layout *layout, const uint8_t *from, bool minus,
                               uint8_t *to, size_t n);
/* ---- PERTA_ENC_VALUES, in io/format/codec_values.c: a bit for each unit, set if it changes, then
 * the new values of the units that change, in planes ---- */

/* Write the payload into s. Returns how many units change. s->planes (n units) gets the units
 * before, with those that change set to 0. */
uint64_t perta_values_write(struct perta_codec_scratch *s, enum perta_dtype dtype,
                            const uint8_t *before, const uint8_t *after, size_t n,
                            struct perta_sections *sections);
/* Count the units that change. Returns NULL, or what is wrong with the payload in s. */
const char *perta_values_count(const struct perta_codec_scratch *s, enum perta_dtype dtype,
                               size_t payload_bytes, size_t n, uint64_t *n_changed);
/* Copy before (n) to after (n), with the new values of the payload in s. *hash_kept: as in codec.h.
 * Returns NULL, or what is wrong. */
const char *perta_values_read(const struct perta_codec_scratch *s, enum perta_dtype dtype,
                              size_t payload_bytes, const uint8_t *before, uint8_t *after, size_t n,
                              uint64_t *hash_kept);

#endif
