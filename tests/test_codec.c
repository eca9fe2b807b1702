/* apply(encode(a, b), a) == b and revert(encode(a, b), b) == a, for any bits. */
#include "tests/unit.h"

#include "io/format/codec.h"
#include "io/format/codec_kernels.h"
#include "io/format/codec_plan.h"
#include "io/format/convert.h"
#include "io/hash.h"
#include "io/isa.h"

#include <zstd.h>

static struct perta_err err;

enum change { NONE, FEW, FINE, HEAVY, ANY, SPECIAL, TUNED, N_CHANGES };

/* bf16 weights, and a fine-tuned version of them: small weights change most. */
static void tune(size_t n, uint8_t *before, uint8_t *after, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        float x = ((float)(next_random(&seed) % 20001) - 10000) * 4e-6f;
        float y = x + ((float)(next_random(&seed) % 201) - 100) * 4e-7f;
        uint16_t high[2] = {(uint16_t)(perta_f32_bits(x) >> 16),
                            (uint16_t)(perta_f32_bits(y) >> 16)};
        memcpy(before + 2 * i, &high[0], 2);
        memcpy(after + 2 * i, &high[1], 2);
    }
}

/* -0, subnormals, Inf, NaNs with payloads and the largest and smallest values, for any float
 * dtype. */
static void special(enum perta_dtype dtype, size_t n, uint8_t *to, uint64_t seed)
{
    unsigned width = perta_dtype_unit_bytes(dtype), mantissa = 8 * width - 9;
    switch (dtype) {
    case PERTA_F16:
        mantissa = 10;
        break;
    case PERTA_F64:
        mantissa = 52;
        break;
    case PERTA_F8_E5M2:
    case PERTA_F8_E4M3:
        mantissa = dtype == PERTA_F8_E5M2 ? 2 : 3;
        break;
    default:
        mantissa = width == 1 ? 4 : mantissa;
    }
    uint64_t sign = 1ull << (8 * width - 1), inf = (sign - 1) >> mantissa << mantissa;
    const uint64_t all[] = {0,
                            1,
                            inf - 1,
                            inf,
                            inf + 1,
                            sign - 1,
                            inf | 1ull << (mantissa - 1),
                            1ull << mantissa,
                            (1ull << mantissa) - 1};
    for (size_t i = 0; i < n; i++) {
        uint64_t r = next_random(&seed), bits = all[r % 9] | (r & 512 ? sign : 0);
        memcpy(to + i * width, &bits, width);
    }
}

/* before: floats of a model's size, or any bits; after: changed by an amount that kind sets. */
static void make(enum perta_dtype dtype, enum change change, size_t n, uint8_t *before,
                 uint8_t *after, uint64_t seed)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    if (change == SPECIAL) {
        special(dtype, n, before, seed);
        special(dtype, n, after, seed + 1);
        return;
    }
    if (change == TUNED && dtype == PERTA_BF16) {
        tune(n, before, after, seed);
        return;
    }
    fill_random(before, n * width, seed);
    for (size_t i = 0; i < n && change != ANY && width > 1; i++) {
        /* an exponent in a narrow range, in any dtype */
        uint8_t *top = before + i * width + width - 1;
        *top = (uint8_t)((*top & 0x80) | 0x3b | (next_random(&seed) & 3));
    }
    memcpy(after, before, n * width);
    for (size_t i = 0; i < n; i++) {
        uint64_t r = next_random(&seed);
        uint8_t *low = after + i * width;
        if (change == FEW && r % 16 == 0)
            *low = (uint8_t)(*low + 1);
        else if (change == FINE)
            *low = (uint8_t)(*low ^ (r & 3));
        else if (change == HEAVY)
            *low = (uint8_t)r;
        else if (change == ANY)
            fill_random(low, width, r);
    }
}

/* Which features the payloads had. */
enum {
    GROUPED = 1,
    LOW_BYTES = 2,
    LOW_BITS = 4,
    RAW = 8,
    OVERFLOW = 16,
    CROSSERS = 32,
    LONG_GAP = 64,
    FIELDS = 128
};
#define ALL_SEEN \
    (FIELDS * 32 - 1) /* FIELDS << bits for bits 0, 1, 2 and 4; bits = 3 does not
                                    * exist */
static unsigned seen = FIELDS << 3;

static uint32_t le(const uint8_t *from, unsigned bytes)
{
    uint32_t value = 0;
    memcpy(&value, from, bytes);
    return value;
}

static void look_at(const uint8_t *frame, const struct perta_coded *coded, unsigned width)
{
    uint8_t *payload = alloc(coded->payload_bytes);
    ck_assert_uint_eq(ZSTD_decompress(payload, coded->payload_bytes, frame, coded->frame_bytes),
                      coded->payload_bytes);
    unsigned n_groups = payload[2], low = payload[3];
    const uint8_t *table = payload + 16;
    seen |= n_groups > 1 ? GROUPED : 0;
    seen |= low == 8 * width ? RAW : (low >= 8 ? LOW_BYTES : 0) | (low % 8 ? LOW_BITS : 0);
    seen |= le(payload + 8, 4) ? OVERFLOW : 0;
    seen |= le(table + 9 * n_groups, 4) ? CROSSERS : 0;
    seen |= le(payload + 4, 4) > le(table + 9 * n_groups, 4) ? LONG_GAP : 0;
    for (unsigned g = 0; g <= n_groups; g++)
        seen |= (unsigned)FIELDS << table[9 * g + 8];
    free(payload);
}

/* A frame of values gives the bytes after. Neither the frame nor the hash of what is kept depends
 * on the old values of the units that change. */
static void one_way(struct perta_codec *codec, enum perta_dtype dtype, const uint8_t *before,
                    const uint8_t *after, size_t len, uint64_t n_changed)
{
    size_t width = perta_dtype_unit_bytes(dtype), room = perta_codec_bound(len);
    uint8_t *frame = alloc(room), *again = alloc(room), *other = alloc(len), *back = alloc(len);
    struct perta_coded coded, recoded;
    uint64_t kept, kept_again, count;
    ck_assert_ok(perta_codec_encode_values(codec, dtype, before, after, len, frame, room, &coded,
                                           &kept, &err));
    ck_assert_uint_eq(coded.n_changed, n_changed);
    if (n_changed) {
        ck_assert_int_eq(coded.encoding, PERTA_ENC_VALUES);
        ck_assert_uint_le(coded.payload_bytes, perta_codec_payload_max(len));
        ck_assert_ok(perta_codec_apply_values(codec, dtype, frame, coded.frame_bytes,
                                              coded.payload_bytes, before, back, len, &kept_again,
                                              &err));
        ck_assert_mem_eq(back, after, len);
        ck_assert_uint_eq(kept, kept_again);
        ck_assert_ok(perta_codec_count(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                       coded.payload_bytes, len, &count, &err));
        ck_assert_uint_eq(count, n_changed);
        struct perta_err why = {0};
        ck_assert_int_eq(perta_codec_revert(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                            coded.payload_bytes, after, back, len, &why),
                         PERTA_EUSAGE);
    } else {
        ck_assert_uint_eq(kept, perta_hash64(before, len));
    }
    for (size_t i = 0; i < len; i += width) { /* other values before, for the units that change */
        bool changes = memcmp(before + i, after + i, width) != 0;
        for (size_t b = 0; b < width; b++)
            other[i + b] = changes ? (uint8_t)~after[i + b] : before[i + b];
    }
    ck_assert_ok(perta_codec_encode_values(codec, dtype, other, after, len, again, room, &recoded,
                                           &kept_again, &err));
    ck_assert_uint_eq(kept, kept_again);
    ck_assert_uint_eq(coded.frame_bytes, recoded.frame_bytes);
    ck_assert_mem_eq(frame, again, coded.frame_bytes);
    free(frame);
    free(again);
    free(other);
    free(back);
}

static void round_trip(struct perta_codec *codec, enum perta_dtype dtype, enum change change,
                       size_t n)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    size_t len = n * width, room = perta_codec_bound(len);
    uint8_t *before = alloc(len + 1), *after = alloc(len + 1), *back = alloc(len);
    uint8_t *frame = alloc(room);
    struct perta_coded coded;
    make(dtype, change, n, before, after, 1000 * n + change);
    ck_assert_ok(perta_codec_encode(codec, dtype, before, after, len, frame, room, &coded, &err));
    uint64_t n_changed = 0;
    for (size_t i = 0; i < n; i++)
        n_changed += memcmp(before + i * width, after + i * width, width) != 0;
    ck_assert_uint_eq(coded.n_changed, n_changed);
    ck_assert_int_eq(coded.encoding == PERTA_ENC_ZERO, n_changed == 0);
    ck_assert_uint_le(coded.payload_bytes, perta_codec_payload_max(len));
    if (n_changed)
        look_at(frame, &coded, width);
    ck_assert_ok(perta_codec_apply(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                   coded.payload_bytes, before, back, len, &err));
    ck_assert_mem_eq(back, after, len);
    ck_assert_ok(perta_codec_revert(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                    coded.payload_bytes, after, back, len, &err));
    ck_assert_mem_eq(back, before, len);
    ck_assert_ok(perta_codec_count(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                   coded.payload_bytes, len, &n_changed, &err));
    ck_assert_uint_eq(coded.n_changed, n_changed);

    one_way(codec, dtype, before, after, len, n_changed);

    /* the same at an unaligned address */
    struct perta_coded again;
    uint8_t *frame2 = alloc(room);
    memmove(before + 1, before, len);
    memmove(after + 1, after, len);
    ck_assert_ok(
        perta_codec_encode(codec, dtype, before + 1, after + 1, len, frame2, room, &again, &err));
    ck_assert_uint_eq(again.frame_bytes, coded.frame_bytes);
    ck_assert_mem_eq(frame, frame2, coded.frame_bytes);
    free(before);
    free(after);
    free(back);
    free(frame);
    free(frame2);
}

START_TEST(any_bits_come_back_for_every_dtype)
{
    static const size_t sizes[] = {1, 2, 3, 63, 64, 65, 1000, 4097};
    struct perta_codec *codec = perta_codec_new(4097 * 8);
    for (int d = 0; d < PERTA_N_DTYPES; d++)
        for (int change = 0; change < N_CHANGES; change++)
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
                round_trip(codec, (enum perta_dtype)d, (enum change)change, sizes[i]);
    perta_codec_free(codec);
}
END_TEST

START_TEST(whole_chunks_come_back_and_every_layout_occurs)
{
    static const enum perta_dtype dtypes[] = {PERTA_BF16, PERTA_F16, PERTA_F32, PERTA_F64,
                                              PERTA_U8};
    struct perta_codec *codec = perta_codec_new(PERTA_CHUNK_ELEMS * 8);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
        for (int change = 0; change < N_CHANGES; change++) {
            round_trip(codec, dtypes[d], (enum change)change, PERTA_CHUNK_ELEMS);
            round_trip(codec, dtypes[d], (enum change)change, PERTA_CHUNK_ELEMS - 1);
        }
    ck_assert_uint_eq(seen, ALL_SEEN);
    perta_codec_free(codec);
}
END_TEST

START_TEST(what_a_codec_takes_is_known_before)
{
    static const size_t sizes[] = {1, 100, 4096, 1 << 20, 4 << 20, 8 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n = sizes[i];
        struct perta_codec *codec = perta_codec_new(n);
        uint8_t *before = alloc(n), *after = alloc(n);
        uint8_t *frame = alloc(perta_codec_bound(n));
        struct perta_coded coded;
        fill_random(before, n, 1);
        fill_random(after, n, 2);
        ck_assert_ok(perta_codec_encode(codec, PERTA_U8, before, after, n, frame,
                                        perta_codec_bound(n), &coded, &err));
        ck_assert_ok(perta_codec_apply(codec, PERTA_U8, coded.encoding, frame, coded.frame_bytes,
                                       coded.payload_bytes, before, after, n, &err));
        ck_assert_uint_le(perta_codec_taken(codec), perta_codec_bytes(n));
        perta_codec_free(codec);
        free(before);
        free(after);
        free(frame);
    }
}
END_TEST

static const struct perta_codec_kernels *const kernels[] = {
    &perta_codec_kernels_v2, &perta_codec_kernels_v3, &perta_codec_kernels_v4,
    &perta_codec_kernels_vbmi2};

/* How many of the kernels run on this machine. */
static int n_kernels(void)
{
    int n = (int)perta_isa_best() + 1;
    return n + (n == PERTA_N_ISAS && __builtin_cpu_supports("avx512vbmi2"));
}

enum { ROOM = 1003 * 8 + 2 * PERTA_KERNEL_SLACK };
static uint8_t a[ROOM], b[ROOM];

/* Compute z from units and back. The results of k are stored at an unaligned address, with guard
 * bytes after them. */
static uint64_t move_units(const struct perta_codec_kernels *k, bool ordered, unsigned width,
                           size_t n, unsigned odd, uint8_t *z, uint8_t *out)
{
    memset(z, 0x5a, ROOM);
    uint64_t changed = k->zigzags(width, ordered, a + 1, b + 1, z + odd, n);
    ck_assert_uint_eq(z[odd + n * width], 0x5a);
    memset(out, 0x5a, ROOM);
    k->add(width, ordered, a + 1, z + odd, false, out + odd, n);
    ck_assert_mem_eq(out + odd, b + 1, n * width);
    k->add(width, ordered, b + 1, z + odd, true, out + odd, n);
    ck_assert_mem_eq(out + odd, a + 1, n * width);
    ck_assert_uint_eq(out[odd + n * width], 0x5a);
    return changed;
}

START_TEST(kernels_move_units_alike_for_every_instruction_set)
{
    static const size_t sizes[] = {1, 2, 3, 15, 17, 31, 33, 63, 64, 65, 127, 1003};
    uint8_t *z[2] = {alloc(ROOM), alloc(ROOM)}, *out = alloc(ROOM);
    fill_random(a, ROOM, 1);
    fill_random(b, ROOM, 2);
    for (size_t i = 0; i < ROOM; i++) /* with small differences among them */
        b[i] = i % 3 ? a[i] : b[i];
    for (int isa = 1; isa < n_kernels(); isa++)
        for (unsigned c = 0; c < 2 * 4 * 12; c++) {
            unsigned width = 1u << ((c >> 1) & 3);
            size_t n = sizes[c >> 3], n_changed = 0;
            for (size_t i = 0; i < n; i++)
                n_changed += memcmp(a + 1 + i * width, b + 1 + i * width, width) != 0;
            ck_assert_uint_eq(move_units(kernels[0], c & 1, width, n, 0, z[0], out), n_changed);
            ck_assert_uint_eq(move_units(kernels[isa], c & 1, width, n, 1, z[1], out), n_changed);
            ck_assert_mem_eq(z[0], z[1] + 1, n * width);
        }
    free(z[0]);
    free(z[1]);
    free(out);
}
END_TEST

/* Written from the text of the format page. */
static void look_at_split(const uint8_t *z, unsigned width, unsigned low, size_t n,
                          uint8_t *const *lows, const uint8_t *values)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t unit = 0;
        memcpy(&unit, z + i * width, width);
        uint64_t high = low < 64 ? unit >> low : 0;
        ck_assert_uint_eq(values[i], high < 255 ? high : 255);
        for (unsigned at = 0; at < low; at += 8)
            ck_assert_uint_eq(lows[at / 8][i],
                              (unit >> at) & (low - at < 8 ? (1u << (low - at)) - 1 : 255));
    }
}

START_TEST(kernels_split_and_join_alike_for_every_instruction_set)
{
    enum { N = 1003, EACH = N + 1 };
    static uint8_t bytes[8 * EACH], values[EACH], z[8 * N + 1];
    uint8_t *lows[8];
    for (int isa = 0; isa < n_kernels(); isa++)
        for (unsigned c = 0; c < 4 * 65; c++) {
            unsigned width = 1u << (c & 3), low = c >> 2;
            size_t n = low % 3 ? N : low + 1, n_changed = 0;
            if (low > 8 * width || (low % 8 & (low % 8 - 1)))
                continue;
            fill_random(a, N * width, c);
            for (size_t i = 0; i < n; i++) { /* small values and zeros; the high bits are
                                              * unchanged */
                uint64_t unit = 0, keep = i % 3
                                              ? (1ull << (low + i % 7 < 63 ? low + i % 7 : 63)) - 1
                                              : UINT64_MAX;
                memcpy(&unit, a + i * width, width);
                unit &= i % 5 ? keep : 0;
                memcpy(a + i * width, &unit, width);
                n_changed += unit != 0;
            }
            memset(bytes, 0x5a, sizeof bytes);
            memset(values, 0x5a, sizeof values);
            for (unsigned p = 0; p < 8; p++)
                lows[p] = bytes + p * EACH;
            kernels[isa]->split(width, low, a, n, lows, values);
            look_at_split(a, width, low, n, lows, values);
            ck_assert_uint_eq(values[n], 0x5a);
            for (unsigned p = 0; p < 8; p++)
                ck_assert_uint_eq(lows[p][8 * p < low ? n : 0], 0x5a);
            kernels[isa]->split(width, low, a, n, NULL, values);
            look_at_split(a, width, low, n, lows, values);
            z[n * width] = 0x5a;
            ck_assert_uint_eq(
                kernels[isa]->join(width, low, values, (const uint8_t *const *)lows, z, n),
                n_changed);
            ck_assert_uint_eq(z[n * width], 0x5a);
            for (size_t i = 0; i < n; i++)
                ck_assert(values[i] == 255 || !memcmp(z + i * width, a + i * width, width));
        }
}
END_TEST

START_TEST(kernels_find_the_same_groups_for_every_instruction_set)
{
    static const enum perta_dtype dtypes[] = {PERTA_F16, PERTA_BF16, PERTA_F32, PERTA_F64};
    uint8_t keys[2][ROOM];
    fill_random(a, ROOM, 3);
    for (int isa = 1; isa < n_kernels(); isa++)
        for (unsigned c = 0; c < 4 * 64; c++) {
            enum perta_dtype dtype = dtypes[c & 3];
            struct perta_grouping g = perta_codec_exponent(dtype);
            unsigned width = perta_dtype_unit_bytes(dtype);
            size_t n = c < 4 ? 1003 : c;
            g.first = c >> 3;
            g.n = c == 5 ? 256 : 1 + (c >> 2 & 31); /* 256: as many as a key can encode */
            for (int i = 0; i < 2; i++) {
                kernels[i * isa]->keys(width, &g, a + 1, keys[i], n);
                kernels[i * isa]->cross(keys[i], a + 900, 99, n);
            }
            ck_assert_mem_eq(keys[0], keys[1], n);
            for (int i = 0; i < 2; i++)
                kernels[i * isa]->keys(width, &g, a + 1, keys[i], n);
            ck_assert_mem_eq(keys[0], keys[1], n);
            for (size_t i = 0; i < n; i++) { /* written from the text of the format page */
                uint64_t unit = 0;
                memcpy(&unit, a + 1 + i * width, width);
                uint64_t e = unit >> g.shift & ((1u << g.e_bits) - 1), last = g.first + g.n - 1;
                ck_assert_uint_eq(keys[0][i], (e < g.first ? g.first
                                               : e > last  ? last
                                                           : e) -
                                                  g.first);
            }
        }
}
END_TEST

/* Scatter and pack n bytes, gather and unpack them; all results of k are stored in out. */
static size_t move_bytes(const struct perta_codec_kernels *k, const uint8_t *x, const uint8_t *keys,
                         size_t n, unsigned n_keys, uint8_t *out)
{
    enum { EACH = 1003 + PERTA_KERNEL_SLACK };
    static uint8_t moved[PERTA_GROUPS_MAX][EACH], back[EACH], packed[EACH];
    uint8_t *to[PERTA_GROUPS_MAX], *start = out;
    const uint8_t *from[PERTA_GROUPS_MAX];
    uint32_t counts[PERTA_GROUPS_MAX] = {0};
    k->count(keys, n, n_keys, counts);
    for (unsigned g = 0; g < n_keys; g++)
        from[g] = to[g] = moved[g];
    k->scatter(x, keys, n, n_keys, to);
    for (unsigned g = 0; g < n_keys; g++) {
        ck_assert_uint_eq((size_t)(to[g] - moved[g]), counts[g]);
        memcpy(out, moved[g], counts[g]);
        out += counts[g];
    }
    memset(back, 0x5a, sizeof back);
    k->gather(back, keys, n, n_keys, from);
    ck_assert_mem_eq(back, x, n);
    ck_assert_uint_eq(back[n], 0x5a);
    for (unsigned bits = 1; bits <= 4; bits *= 2) {
        uint8_t full = (uint8_t)((1u << bits) - 1);
        size_t len = (n * bits + 7) / 8, n_rest = k->at_least(x, full, n), rest = 0;
        packed[len] = back[n] = 0x5a;
        k->pack(bits, x, n, packed);
        k->unpack(bits, packed, n, back);
        ck_assert_uint_eq(packed[len], 0x5a);
        ck_assert_uint_eq(back[n], 0x5a);
        ck_assert_uint_eq(k->pick(x, full, n, moved[0]), n_rest);
        for (size_t i = 0; i < n; i++) {
            ck_assert_uint_eq(back[i], x[i] < full ? x[i] : full);
            if (x[i] >= full)
                ck_assert_uint_eq(moved[0][rest++], x[i]);
        }
        ck_assert_uint_eq(rest, n_rest);
        k->put(back, full, n, moved[0]);
        ck_assert_mem_eq(back, x, n);
        memcpy(out, packed, len);
        out += len;
    }
    uint16_t at[1003 + PERTA_KERNEL_SLACK];
    size_t found = k->find(x, 7, n, at), sevens = 0;
    for (size_t i = 0; i < n; i++)
        if (x[i] == 7)
            ck_assert_uint_eq(at[sevens++], i);
    ck_assert_uint_eq(found, sevens);
    return (size_t)(out - start);
}

START_TEST(kernels_move_bytes_alike_for_every_instruction_set)
{
    static uint8_t out[2][4 * 1003];
    uint8_t keys[1003];
    uint64_t seed = 4;
    fill_random(a, ROOM, 5);
    for (int isa = 1; isa < n_kernels(); isa++)
        for (size_t n = 1; n <= 1003; n += 1 + n / 9) {
            unsigned n_keys = 1 + (unsigned)(next_random(&seed) % PERTA_GROUPS_MAX);
            for (size_t i = 0; i < n; i++) {
                keys[i] = (uint8_t)(next_random(&seed) % n_keys);
                a[i] = (uint8_t)(next_random(&seed) >> (next_random(&seed) % 8 + 56));
            }
            size_t len = move_bytes(kernels[0], a, keys, n, n_keys, out[0]);
            ck_assert_uint_eq(move_bytes(kernels[isa], a, keys, n, n_keys, out[1]), len);
            ck_assert_mem_eq(out[0], out[1], len);
        }
}
END_TEST

START_TEST(frames_that_lie_are_refused_or_harmless)
{
    size_t n = 200000, len = n * 2, room = perta_codec_bound(len);
    struct perta_codec *codec = perta_codec_new(len);
    uint8_t *before = alloc(len), *after = alloc(len), *out = alloc(len), *frame = alloc(room);
    struct perta_coded coded;
    uint64_t seed = 9;
    tune(n, before, after, 5);
    ck_assert_ok(
        perta_codec_encode(codec, PERTA_BF16, before, after, len, frame, room, &coded, &err));
    look_at(frame, &coded, 2);
    ck_assert(seen & GROUPED);
    for (int i = 0; i < 3000; i++) {
        uint64_t r = next_random(&seed);
        size_t at = r % coded.frame_bytes;
        uint8_t was = frame[at];
        enum perta_encoding encoding = (enum perta_encoding)((r >> 32) % PERTA_N_ENCODINGS);
        size_t payload = (r >> 40) % 3 ? coded.payload_bytes : (r >> 20) % (len + 99);
        frame[at] = (uint8_t)(r >> 16);
        struct perta_err why = {0};
        int rc = perta_codec_apply(codec, PERTA_BF16, encoding, frame, coded.frame_bytes, payload,
                                   before, out, len, &why);
        ck_assert(rc == 0 || rc == PERTA_ECHECK);
        frame[at] = was;
    }
    perta_codec_free(codec);
    free(before);
    free(after);
    free(out);
    free(frame);
}
END_TEST

/* A plausible payload of n units; returns its length. */
static size_t lie(uint64_t r, enum perta_dtype dtype, size_t n, uint8_t *payload)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    uint64_t seed = r;
    uint32_t n_groups = perta_codec_groups(dtype) ? 1 + (uint32_t)(r >> 8) % 3 : 1;
    static const uint8_t lows[] = {0, 1, 2, 4, 8, 9, 16, 20, 28, 32, 34, 64};
    unsigned low = lows[(r >> 40) % 12] % (8 * width + 1);
    uint8_t *at = payload + 16 + 9 * (n_groups + 1);
    uint32_t left = (uint32_t)n, gaps = 0;
    uint32_t crossers = n_groups > 1 ? (uint32_t)((r >> 20) % (n / 8 + 1)) : 0;
    for (; gaps < crossers; gaps++)
        *at++ = (uint8_t)(next_random(&seed) % 8);
    size_t low_bytes = low / 8 * n + (n * (low % 8) + 7) / 8;
    memset(at, (int)(r >> 60), low_bytes);
    at += low_bytes;
    left -= crossers;
    uint32_t n_changed = low && r >> 60 ? (uint32_t)n : 0;
    for (uint32_t g = 0; g <= n_groups; g++) {
        uint32_t of = g == n_groups       ? crossers
                      : g + 1 == n_groups ? left
                                          : (uint32_t)(next_random(&seed) % (left + 1));
        left -= g == n_groups ? 0 : of;
        uint8_t bits = (uint8_t)("\0\1\2\4"[next_random(&seed) % 4]), *fields = at;
        uint32_t rest = bits ? 0 : of;
        at += ((size_t)of * bits + 7) / 8;
        fill_random(fields, (size_t)(at - fields), r + g);
        if (bits == 1) /* so that the rest can have the full length */
            for (uint32_t i = rest = 0; i < of; i++)
                rest += fields[i % ((of + 7) / 8)] >> (i / ((of + 7) / 8)) & 1;
        else if (bits)
            memset(fields, 0, (size_t)(at - fields));
        memcpy(payload + 16 + 9 * g, &of, 4);
        memcpy(payload + 20 + 9 * g, &rest, 4);
        payload[24 + 9 * g] = bits;
        fill_random(at, rest, r + 2 * g);
        for (size_t i = 0; i < rest; i++) {
            at[i] = at[i] % 254 + 1;
            n_changed += !low && at[i];
        }
        at += rest;
    }
    memset(payload, 0, 16);
    payload[2] = (uint8_t)n_groups;
    payload[3] = (uint8_t)low;
    memcpy(payload + 4, &gaps, 4);
    memcpy(payload + 12, &n_changed, 4);
    return (size_t)(at - payload);
}

/* A sound frame around any payload, whose table may say anything: refused, or harmless. */
START_TEST(payloads_that_lie_are_refused_or_harmless)
{
    enum { MAX = 4096, MOST = 4 * MAX };
    struct perta_codec *codec = perta_codec_new(MAX);
    uint8_t *payload = alloc(MOST), *frame = alloc(ZSTD_compressBound(MOST));
    uint64_t seed = 11;
    unsigned n_fine = 0, n_grouped = 0;
    for (int i = 0; i < 40000; i++) {
        uint64_t r = next_random(&seed);
        enum perta_dtype dtype = (enum perta_dtype)(r % PERTA_N_DTYPES);
        unsigned width = perta_dtype_unit_bytes(dtype);
        size_t n = (r >> 16) % (i % 8 ? 40 : MAX / width), len = n * width;
        size_t payload_bytes = lie(r, dtype, n, payload);
        if (i % 3 == 0) /* and then one byte of it */
            payload[(r >> 24) % payload_bytes] = (uint8_t)(r >> 50);
        if (r >> 60 == 0)
            payload_bytes = (r >> 20) % (2 * MAX);
        size_t frame_bytes =
            ZSTD_compress(frame, ZSTD_compressBound(MOST), payload, payload_bytes, 1);
        uint8_t *from = malloc(len + 1),
                *to = malloc(len + !len); /* so that ASan sees where they end */
        fill_random(from, len, r + 1);
        if (i & 2 && width > 1) /* every unit in the lowest group: the last of three may be empty */
            memset(from, 0, len);
        struct perta_err why = {0};
        int rc = (i & 1 ? perta_codec_apply : perta_codec_revert)(
            codec, dtype, PERTA_ENC_DELTA, frame, frame_bytes, payload_bytes, from, to, len, &why);
        ck_assert(rc == 0 || (rc == PERTA_ECHECK && strstr(why.msg, "the frame is damaged: ")));
        uint64_t n_changed;
        int rc_count = perta_codec_count(codec, dtype, PERTA_ENC_DELTA, frame, frame_bytes,
                                         payload_bytes, len, &n_changed, &why);
        ck_assert(rc_count == rc || rc == PERTA_ECHECK); /* whether the values fit is checked by
                                                          * apply */
        n_fine += !rc;
        n_grouped += !rc && perta_codec_groups(dtype) && 1 + (uint32_t)(r >> 8) % 3 > 1;
        free(from);
        free(to);
    }
    ck_assert_uint_gt(n_fine, 1000); /* so that not every input is refused */
    ck_assert_uint_gt(n_grouped, 10);
    perta_codec_free(codec);
    free(payload);
    free(frame);
}
END_TEST

/* A whole frame with slightly wrong counts: of units that change, and of values that overflow. */
START_TEST(counts_that_lie_are_refused)
{
    enum { N = 4096, LEN = 2 * N };
    struct perta_codec *codec = perta_codec_new(LEN);
    uint8_t *before = alloc(LEN), *after = alloc(LEN), *out = alloc(LEN);
    uint8_t *frame = alloc(perta_codec_bound(LEN)), *payload = alloc(2 * LEN);
    struct perta_coded coded;
    fill_random(before, LEN, 21);
    memcpy(after, before, LEN);
    for (size_t i = 0; i < N; i += 64)
        after[2 * i + 1] ^= 0x3f; /* large, and few: they overflow */
    ck_assert_ok(perta_codec_encode(codec, PERTA_U16, before, after, LEN, frame,
                                    perta_codec_bound(LEN), &coded, &err));
    size_t n = coded.payload_bytes;
    ck_assert_uint_eq(ZSTD_decompress(payload, 2 * LEN, frame, coded.frame_bytes), n);
    ck_assert_uint_eq(le(payload + 8, 4), N / 64);
    for (int lie = 0; lie < 3; lie++) {
        static const char *const messages[] = {"", "it does not change as many units as it says",
                                               "what overflows makes no sense"};
        struct perta_err why = {0};
        payload[12] ^= lie == 1;
        if (lie == 2) /* the first of them becomes 7 */
            payload[n - N / 32] = 7, payload[n - N / 64] = 0;
        size_t len = ZSTD_compress(frame, perta_codec_bound(LEN), payload, n, 1);
        int rc = perta_codec_apply(codec, PERTA_U16, PERTA_ENC_DELTA, frame, len, n, before, out,
                                   LEN, &why);
        ck_assert_int_eq(rc, lie ? PERTA_ECHECK : 0);
        ck_assert(strstr(why.msg, messages[lie]));
        payload[12] ^= lie == 1;
    }
    perta_codec_free(codec);
    free(before);
    free(after);
    free(out);
    free(frame);
    free(payload);
}
END_TEST

/* What compose does if nothing is grouped: the same frame, without the bytes before. */
START_TEST(what_is_never_grouped_adds_up_on_any_bytes_before)
{
    enum { LEN = 4096 };
    static const uint8_t zeros[LEN];
    struct perta_codec *codec = perta_codec_new(LEN);
    uint8_t *steps[3] = {alloc(LEN), alloc(LEN), alloc(LEN)}, *sum[2] = {alloc(LEN), alloc(LEN)};
    uint8_t *frame = alloc(perta_codec_bound(LEN)), *again = alloc(perta_codec_bound(LEN));
    for (int d = 0; d < PERTA_N_DTYPES; d++) {
        enum perta_dtype dtype = (enum perta_dtype)d;
        struct perta_coded coded;
        for (int i = 0; i < 3; i++)
            fill_random(steps[i], LEN, (uint64_t)d * 3 + (uint64_t)i);
        if (perta_codec_groups(dtype))
            continue;
        const uint8_t *at = zeros;
        for (int i = 0; i < 2; i++) {
            ck_assert_ok(perta_codec_encode(codec, dtype, steps[i], steps[i + 1], LEN, frame,
                                            perta_codec_bound(LEN), &coded, &err));
            ck_assert_ok(perta_codec_apply(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                           coded.payload_bytes, at, sum[i], LEN, &err));
            at = sum[i];
        }
        ck_assert_ok(perta_codec_encode(codec, dtype, zeros, at, LEN, again, perta_codec_bound(LEN),
                                        &coded, &err));
        size_t n = coded.frame_bytes;
        ck_assert_ok(perta_codec_encode(codec, dtype, steps[0], steps[2], LEN, frame,
                                        perta_codec_bound(LEN), &coded, &err));
        ck_assert_uint_eq(coded.frame_bytes, n);
        ck_assert_mem_eq(frame, again, n);
    }
    for (int i = 0; i < 3; i++)
        free(steps[i]);
    for (int i = 0; i < 2; i++)
        free(sum[i]);
    free(frame);
    free(again);
    perta_codec_free(codec);
}
END_TEST

START_TEST(a_chunk_too_large_for_the_codec_is_refused)
{
    struct perta_codec *codec = perta_codec_new(64);
    uint8_t bytes[128] = {0}, out[128], frame[256];
    size_t n = ZSTD_compress(frame, sizeof frame, bytes, sizeof bytes, 1);
    ck_assert_int_eq(
        perta_codec_apply(codec, PERTA_U8, PERTA_ENC_DELTA, frame, n, 128, bytes, out, 128, &err),
        PERTA_ECHECK);
    perta_codec_free(codec);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("codec");
    tcase_add_test(tests, any_bits_come_back_for_every_dtype);
    tcase_add_test(tests, whole_chunks_come_back_and_every_layout_occurs);
    tcase_add_test(tests, what_a_codec_takes_is_known_before);
    tcase_add_test(tests, kernels_move_units_alike_for_every_instruction_set);
    tcase_add_test(tests, kernels_split_and_join_alike_for_every_instruction_set);
    tcase_add_test(tests, kernels_find_the_same_groups_for_every_instruction_set);
    tcase_add_test(tests, kernels_move_bytes_alike_for_every_instruction_set);
    tcase_add_test(tests, frames_that_lie_are_refused_or_harmless);
    tcase_add_test(tests, payloads_that_lie_are_refused_or_harmless);
    tcase_add_test(tests, counts_that_lie_are_refused);
    tcase_add_test(tests, what_is_never_grouped_adds_up_on_any_bytes_before);
    tcase_add_test(tests, a_chunk_too_large_for_the_codec_is_refused);
    return run_suite("codec", tests);
}
