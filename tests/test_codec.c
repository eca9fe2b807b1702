/* apply(encode(a, b), a) == b and revert(encode(a, b), b) == a, for any bits. */
#include "tests/unit.h"

#include "io/codec.h"
#include "io/codec_kernels.h"
#include "io/isa.h"

#include <zstd.h>

static struct perta_err err;

enum change { NONE, FEW, FINE, HEAVY, ANY, SPECIAL, N_CHANGES };

/* bf16 weights, and what fine-tuning makes of them: small weights change most. */
static void tune(size_t n, uint8_t *before, uint8_t *after, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        float x[2];
        x[0] = ((float)(next_random(&seed) % 20001) - 10000) * 4e-6f;
        x[1] = x[0] + ((float)(next_random(&seed) % 201) - 100) * 4e-7f;
        memcpy(before + 2 * i, (char *)&x[0] + 2, 2);
        memcpy(after + 2 * i, (char *)&x[1] + 2, 2);
    }
}

/* -0, subnormals, Inf, NaNs with payloads, the largest and smallest, for any float dtype. */
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
    const uint64_t all[] = {0, 1, inf - 1, inf, inf + 1, sign - 1, inf | 1ull << (mantissa - 1),
                            1ull << mantissa, (1ull << mantissa) - 1};
    for (size_t i = 0; i < n; i++) {
        uint64_t r = next_random(&seed), bits = all[r % 9] | (r & 512 ? sign : 0);
        memcpy(to + i * width, &bits, width);
    }
}

/* before: floats of a model's size (or any bits); after: changed by so much. */
static void make(enum perta_dtype dtype, enum change change, size_t n, uint8_t *before,
                 uint8_t *after, uint64_t seed)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    if (change == SPECIAL) {
        special(dtype, n, before, seed);
        special(dtype, n, after, seed + 1);
        return;
    }
    fill_random(before, n * width, seed);
    for (size_t i = 0; i < n && change != ANY && width > 1; i++) {
        /* an exponent in a narrow range, whatever the dtype */
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

static unsigned seen; /* encodings, as bits */

static void round_trip(struct perta_codec *codec, enum perta_dtype dtype, enum change change,
                       size_t n)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    size_t len = n * width, room = perta_codec_bound(len);
    uint8_t *before = alloc(len + 1), *after = alloc(len + 1), *back = alloc(len);
    uint8_t *frame = alloc(room);
    struct perta_coded coded;
    make(dtype, change, n, before, after, 1000 * n + change);
    ck_assert_ok(
        perta_codec_encode(codec, dtype, before, after, len, frame, room, &coded, &err));
    uint64_t n_changed = 0;
    for (size_t i = 0; i < n; i++)
        n_changed += memcmp(before + i * width, after + i * width, width) != 0;
    ck_assert_uint_eq(coded.n_changed, n_changed);
    ck_assert_int_eq(coded.encoding == PERTA_ENC_ZERO, n_changed == 0);
    ck_assert_uint_le(coded.payload_bytes, perta_codec_payload_max(len));
    seen |= 1u << coded.encoding;
    ck_assert_ok(perta_codec_apply(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                   coded.payload_bytes, before, back, len, &err));
    ck_assert_mem_eq(back, after, len);
    ck_assert_ok(perta_codec_revert(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                    coded.payload_bytes, after, back, len, &err));
    ck_assert_mem_eq(back, before, len);
    ck_assert_ok(perta_codec_count(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                   coded.payload_bytes, len, &n_changed, &err));
    ck_assert_uint_eq(coded.n_changed, n_changed);

    /* the same at an odd address */
    struct perta_coded again;
    uint8_t *frame2 = alloc(room);
    memmove(before + 1, before, len);
    memmove(after + 1, after, len);
    ck_assert_ok(perta_codec_encode(codec, dtype, before + 1, after + 1, len, frame2, room, &again,
                                    &err));
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

START_TEST(whole_chunks_come_back_and_every_encoding_occurs)
{
    static const enum perta_dtype dtypes[] = {PERTA_BF16, PERTA_F16, PERTA_F32, PERTA_F64,
                                              PERTA_U8};
    struct perta_codec *codec = perta_codec_new(PERTA_CHUNK_ELEMS * 8);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
        for (int change = 0; change < N_CHANGES; change++) {
            round_trip(codec, dtypes[d], (enum change)change, PERTA_CHUNK_ELEMS);
            round_trip(codec, dtypes[d], (enum change)change, PERTA_CHUNK_ELEMS - 1);
        }
    ck_assert_uint_eq(seen, (1u << PERTA_N_ENCODINGS) - 1);
    perta_codec_free(codec);
}
END_TEST

START_TEST(kernels_agree_for_every_instruction_set)
{
    static const struct perta_codec_kernels *const all[] = {
        &perta_codec_kernels_v2, &perta_codec_kernels_v3, &perta_codec_kernels_v4};
    static const size_t sizes[] = {1, 2, 3, 15, 17, 31, 33, 63, 64, 65, 127, 1003};
    size_t room = 1003 * 8 + 1;
    uint8_t *a = alloc(room), *b = alloc(room), *z[2], *out[2];
    for (int i = 0; i < 2; i++) {
        z[i] = alloc(room);
        out[i] = alloc(room);
    }
    fill_random(a, room, 1);
    fill_random(b, room, 2);
    for (int isa = 1; isa <= (int)perta_isa_best(); isa++)
        for (unsigned c = 0; c < 2 * 4 * 12; c++) {
            bool ordered = c & 1;
            unsigned width = 1u << ((c >> 1) & 3);
            size_t n = sizes[c >> 3], len = n * width;
            const struct perta_codec_kernels *k[2] = {all[0], all[isa]};
            uint64_t changed[2];
            for (int i = 0; i < 2; i++) { /* at an even and at an odd address */
                memset(z[i], 0x5a, room);
                changed[i] = k[i]->delta(width, ordered, a + 1, b + 1, z[i] + i, n);
            }
            ck_assert_uint_eq(changed[0], changed[1]);
            ck_assert_mem_eq(z[0], z[1] + 1, len);
            ck_assert(len + 2 > room || z[1][len + 1] == 0x5a); /* it kept to its room */
            for (int i = 0; i < 2; i++) {
                k[i]->add(width, ordered, a + 1, z[i] + i, 1, out[i] + i, n);
                ck_assert_mem_eq(out[i] + i, b + 1, len);
                k[i]->add(width, ordered, b + 1, z[i] + i, -1, out[i] + i, n);
                ck_assert_mem_eq(out[i] + i, a + 1, len);
                k[i]->split(width, z[i] + i, out[i] + i, n);
            }
            ck_assert_mem_eq(out[0], out[1] + 1, len);
            for (int i = 0; i < 2; i++)
                k[i]->join(width, out[i] + i, z[1 - i], n);
            ck_assert_mem_eq(z[0], z[1], len);
        }
    for (int i = 0; i < 2; i++) {
        free(z[i]);
        free(out[i]);
    }
    free(a);
    free(b);
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
    ck_assert_ok(perta_codec_encode(codec, PERTA_BF16, before, after, len, frame, room, &coded,
                                    &err));
    ck_assert_int_eq(coded.encoding, PERTA_ENC_GROUPED);
    for (int i = 0; i < 3000; i++) {
        uint64_t r = next_random(&seed);
        size_t at = r % coded.frame_bytes;
        uint8_t was = frame[at];
        enum perta_encoding encoding = (enum perta_encoding)(1 + (r >> 32) % 3);
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

/* Whatever bytes a sound frame holds, and whatever the table says of them. */
START_TEST(payloads_that_lie_are_refused_or_harmless)
{
    enum { MAX = 4096 };
    struct perta_codec *codec = perta_codec_new(MAX);
    uint8_t *payload = alloc(2 * MAX), *frame = alloc(ZSTD_compressBound(2 * MAX));
    uint64_t seed = 11;
    unsigned n_fine[PERTA_N_ENCODINGS] = {0};
    for (int i = 0; i < 20000; i++) {
        uint64_t r = next_random(&seed);
        enum perta_dtype dtype = (enum perta_dtype)(r % PERTA_N_DTYPES);
        enum perta_encoding encoding = (enum perta_encoding)((r >> 8) % PERTA_N_ENCODINGS);
        unsigned width = perta_dtype_unit_bytes(dtype);
        size_t n = (r >> 16) % (i % 8 ? 40 : MAX / width), len = n * width;
        size_t payload_bytes = len;
        fill_random(payload, 2 * MAX, r);
        if (encoding == PERTA_ENC_GROUPED) { /* a head that makes some sense */
            size_t crossers = (r >> 32) % (n / 8 + 2), gaps = (r >> 40) % (crossers + 2);
            uint16_t key_floor = (uint16_t)((r >> 48) % 300);
            uint32_t head[2] = {(uint32_t)crossers, (uint32_t)gaps};
            memcpy(payload, &key_floor, 2);
            memcpy(payload + 2, head, 8);
            for (size_t g = 0; g < gaps; g++)
                payload[10 + g] = (uint8_t)(payload[10 + g] % 9 == 8 ? 255 : payload[10 + g] % 9);
            payload_bytes += 10 + gaps;
        }
        if (r >> 60 == 0)
            payload_bytes = (r >> 20) % (2 * MAX);
        size_t frame_bytes = ZSTD_compress(frame, ZSTD_compressBound(2 * MAX), payload,
                                           payload_bytes, 1);
        uint8_t *from = malloc(len + 1), *to = malloc(len + !len); /* ASan sees their ends */
        fill_random(from, len, r + 1);
        struct perta_err why = {0};
        int rc = (i & 1 ? perta_codec_apply : perta_codec_revert)(
            codec, dtype, encoding, frame, frame_bytes, payload_bytes, from, to, len, &why);
        ck_assert(rc == 0 || (rc == PERTA_ECHECK && strstr(why.msg, "the frame is damaged: ")));
        uint64_t n_changed;
        ck_assert_int_eq(perta_codec_count(codec, dtype, encoding, frame, frame_bytes,
                                           payload_bytes, len, &n_changed, &why),
                         rc);
        n_fine[encoding] += !rc;
        free(from);
        free(to);
    }
    for (int e = 0; e < PERTA_N_ENCODINGS; e++)
        ck_assert_uint_gt(n_fine[e], 100); /* so that refusals are not all it saw */
    perta_codec_free(codec);
    free(payload);
    free(frame);
}
END_TEST

/* As compose does it where nothing is grouped: the same frame, without the bytes before. */
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
            fill_random(steps[i], LEN, (uint64_t)(3 * d + i));
        if (perta_codec_groups(dtype))
            continue;
        const uint8_t *at = zeros;
        for (int i = 0; i < 2; i++) {
            ck_assert_ok(perta_codec_encode(codec, dtype, steps[i], steps[i + 1], LEN, frame,
                                            perta_codec_bound(LEN), &coded, &err));
            ck_assert_ok(perta_codec_apply(codec, dtype, coded.encoding, frame,
                                           coded.frame_bytes, coded.payload_bytes, at, sum[i],
                                           LEN, &err));
            at = sum[i];
        }
        ck_assert_ok(perta_codec_encode(codec, dtype, zeros, at, LEN, again,
                                        perta_codec_bound(LEN), &coded, &err));
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
    ck_assert_int_eq(perta_codec_apply(codec, PERTA_U8, PERTA_ENC_RAW, frame, n, 128, bytes, out,
                                       128, &err),
                     PERTA_ECHECK);
    perta_codec_free(codec);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("codec");
    tcase_add_test(tests, any_bits_come_back_for_every_dtype);
    tcase_add_test(tests, whole_chunks_come_back_and_every_encoding_occurs);
    tcase_add_test(tests, kernels_agree_for_every_instruction_set);
    tcase_add_test(tests, frames_that_lie_are_refused_or_harmless);
    tcase_add_test(tests, payloads_that_lie_are_refused_or_harmless);
    tcase_add_test(tests, what_is_never_grouped_adds_up_on_any_bytes_before);
    tcase_add_test(tests, a_chunk_too_large_for_the_codec_is_refused);
    return run_suite("codec", tests);
}
