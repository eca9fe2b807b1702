/* Compare the patch coder with other coders, on one thread: bits per parameter and GB/s. The inputs
 * are two raw files of the same length, which are coded chunk by chunk.
 *
 *     bench_codec DTYPE BEFORE AFTER [ROUNDS [CODERS]]
 *
 * (CODERS: only the first so many coders.) Prints a JSON object: the share of units that are
 * unchanged; the order-0 entropy of the integer difference, and what remains of it once the
 * exponent of the old value is known; then for each coder bits per unit, and GB/s of the original
 * bytes for encoding and decoding, as median, minimum and maximum of all rounds (the coders take
 * turns). The result of every coder is decoded and compared. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <zstd.h>

#include "io/format/codec.h"

#define ROUNDS_MAX 99

struct job {
    enum perta_dtype dtype;
    unsigned width;
    const uint8_t *before, *after;
    size_t len_bytes, chunk_bytes;
    uint8_t *frames, *scratch, *planes, *out; /* frames: those of all chunks, one after another */
    size_t *frame_bytes;
    struct perta_coded *coded;
    struct perta_codec *codec;
    ZSTD_CCtx *pack;
    ZSTD_DCtx *unpack;
};

static void die(const char *what)
{
    fprintf(stderr, "bench_codec: %s\n", what);
    exit(1);
}

/* CPU time of this thread, so that other work on the machine matters less. */
static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static uint64_t unit(const uint8_t *bytes, unsigned width)
{
    uint64_t u = 0;
    memcpy(&u, bytes, width);
    return u;
}

/* ---- coders: a chunk to dst, returns its bytes; and back into out ---- */

static size_t perta_encode(struct job *j, size_t at, size_t len, uint8_t *dst)
{
    struct perta_err err = {0};
    struct perta_coded *coded = &j->coded[at / j->chunk_bytes];
    if (perta_codec_encode(j->codec, j->dtype, j->before + at, j->after + at, len, dst,
                           perta_codec_bound(len), coded, &err))
        die(err.msg);
    return coded->frame_bytes;
}

static void perta_decode(struct job *j, size_t at, size_t len, const uint8_t *frame,
                         size_t frame_bytes)
{
    struct perta_err err = {0};
    const struct perta_coded *coded = &j->coded[at / j->chunk_bytes];
    if (perta_codec_apply(j->codec, j->dtype, coded->encoding, frame, frame_bytes,
                          coded->payload_bytes, j->before + at, j->out, len, &err))
        die(err.msg);
}

static void split(const uint8_t *units, unsigned width, size_t n, uint8_t *planes)
{
    for (unsigned b = 0; b < width; b++)
        for (size_t i = 0; i < n; i++)
            planes[b * n + i] = units[width * i + b];
}

static void join(const uint8_t *planes, unsigned width, size_t n, uint8_t *units)
{
    for (unsigned b = 0; b < width; b++)
        for (size_t i = 0; i < n; i++)
            units[width * i + b] = planes[b * n + i];
}

/* 16-bit units have loops of their own, which the compiler vectorises. */
static void split_2(const uint8_t *units, size_t n, uint8_t *planes)
{
    split(units, 2, n, planes);
}

static void join_2(const uint8_t *planes, size_t n, uint8_t *units)
{
    join(planes, 2, n, units);
}

static size_t pack_planes(struct job *j, size_t len, uint8_t *dst)
{
    if (j->width == 2)
        split_2(j->scratch, len / 2, j->planes);
    else
        split(j->scratch, j->width, len / j->width, j->planes);
    size_t n = ZSTD_compressCCtx(j->pack, dst, perta_codec_bound(len), j->planes, len, 1);
    if (ZSTD_isError(n))
        die(ZSTD_getErrorName(n));
    return n;
}

static void unpack_planes(struct job *j, size_t len, const uint8_t *frame, size_t frame_bytes)
{
    if (ZSTD_decompressDCtx(j->unpack, j->planes, len, frame, frame_bytes) != len)
        die("zstd");
    if (j->width == 2)
        join_2(j->planes, len / 2, j->scratch);
    else
        join(j->planes, j->width, len / j->width, j->scratch);
}

/* XOR, byte split, zstd 1: BitX (ZipLLM). */
static size_t bitx_encode(struct job *j, size_t at, size_t len, uint8_t *dst)
{
    for (size_t i = 0; i < len; i++)
        j->scratch[i] = j->before[at + i] ^ j->after[at + i];
    return pack_planes(j, len, dst);
}

static void bitx_decode(struct job *j, size_t at, size_t len, const uint8_t *frame,
                        size_t frame_bytes)
{
    unpack_planes(j, len, frame, frame_bytes);
    for (size_t i = 0; i < len; i++)
        j->out[i] = j->before[at + i] ^ j->scratch[i];
}

/* The new values alone, byte split, zstd 1 (close to what ZipNN does). */
static size_t whole_encode(struct job *j, size_t at, size_t len, uint8_t *dst)
{
    memcpy(j->scratch, j->after + at, len);
    return pack_planes(j, len, dst);
}

static void whole_decode(struct job *j, size_t at, size_t len, const uint8_t *frame,
                         size_t frame_bytes)
{
    (void)at;
    unpack_planes(j, len, frame, frame_bytes);
    memcpy(j->out, j->scratch, len);
}

static const struct coder {
    const char *name;
    size_t (*encode)(struct job *j, size_t at, size_t len, uint8_t *dst);
    void (*decode)(struct job *j, size_t at, size_t len, const uint8_t *frame, size_t frame_bytes);
} coders[] = {
    {"perta", perta_encode, perta_decode},
    {"XOR, byte split, zstd 1", bitx_encode, bitx_decode},
    {"new values, byte split, zstd 1", whole_encode, whole_decode},
};
enum { N_CODERS = sizeof coders / sizeof *coders };

struct figures {
    double encode[ROUNDS_MAX], decode[ROUNDS_MAX]; /* seconds */
    size_t len_bytes;
};

static void run(struct job *j, const struct coder *coder, struct figures *f, int round)
{
    double start = seconds();
    uint8_t *dst = j->frames;
    f->len_bytes = 0;
    for (size_t at = 0, k = 0; at < j->len_bytes; at += j->chunk_bytes, k++) {
        size_t len = j->len_bytes - at < j->chunk_bytes ? j->len_bytes - at : j->chunk_bytes;
        j->frame_bytes[k] = coder->encode(j, at, len, dst);
        dst += j->frame_bytes[k];
        f->len_bytes += j->frame_bytes[k];
    }
    f->encode[round] = seconds() - start;
    f->decode[round] = 0;
    dst = j->frames;
    for (size_t at = 0, k = 0; at < j->len_bytes; at += j->chunk_bytes, k++) {
        size_t len = j->len_bytes - at < j->chunk_bytes ? j->len_bytes - at : j->chunk_bytes;
        start = seconds();
        coder->decode(j, at, len, dst, j->frame_bytes[k]);
        f->decode[round] += seconds() - start;
        dst += j->frame_bytes[k];
        if (memcmp(j->out, j->after + at, len))
            die("a coder does not give back what it got");
    }
}

/* ---- entropy of the difference of 16-bit units ---- */

static uint32_t *counted(const struct job *j, bool by_exponent, unsigned exponent_shift)
{
    uint32_t *counts = calloc(256u << 16, sizeof *counts);
    for (size_t i = 0; counts && i < j->len_bytes; i += 2) {
        uint32_t a = (uint32_t)unit(j->before + i, 2), b = (uint32_t)unit(j->after + i, 2);
        uint32_t key = by_exponent ? (a & 0x7fff) >> exponent_shift : 0;
        a = a & 0x8000 ? ~a & 0xffff : a | 0x8000;
        b = b & 0x8000 ? ~b & 0xffff : b | 0x8000;
        counts[key << 16 | ((b - a) & 0xffff)]++;
    }
    return counts;
}

static double entropy(const struct job *j, bool by_exponent, unsigned exponent_shift)
{
    uint32_t *counts = counted(j, by_exponent, exponent_shift);
    if (!counts)
        die("no memory");
    double bits = 0;
    for (uint32_t key = 0; key < 256; key++) {
        double n = 0, sum = 0;
        for (uint32_t d = 0; d < 1 << 16; d++) {
            double c = counts[key << 16 | d];
            n += c;
            sum += c > 0 ? c * log2(c) : 0;
        }
        bits += n > 0 ? n * log2(n) - sum : 0;
    }
    free(counts);
    return bits / ((double)j->len_bytes / 2);
}

static double unchanged(const struct job *j)
{
    size_t n = 0;
    for (size_t i = 0; i < j->len_bytes; i += j->width)
        n += !memcmp(j->before + i, j->after + i, j->width);
    return (double)n / ((double)j->len_bytes / j->width);
}

/* ---- the table ---- */

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_rate(const char *name, double *times, int n, size_t len_bytes)
{
    qsort(times, (size_t)n, sizeof *times, by_size);
    double gb = (double)len_bytes / 1e9;
    printf(", \"%s\": [%.3f, %.3f, %.3f]", name, gb / times[n / 2], gb / times[n - 1],
           gb / times[0]);
}

/* Memory backed by huge pages, like the buffers of the loop. */
static void *room(size_t len_bytes)
{
    size_t huge = 1 << 21, all = (len_bytes + huge - 1) / huge * huge;
    void *bytes = aligned_alloc(huge, all);
    if (!bytes)
        die("no memory");
    madvise(bytes, all, MADV_HUGEPAGE);
    memset(bytes, 1, all);
    return bytes;
}

static const uint8_t *load(const char *path, size_t *len_bytes)
{
    FILE *file = fopen(path, "rb");
    struct stat st;
    if (!file || fstat(fileno(file), &st) || !st.st_size)
        die(path);
    *len_bytes = (size_t)st.st_size;
    void *bytes = room(*len_bytes);
    if (fread(bytes, 1, *len_bytes, file) != *len_bytes)
        die(path);
    fclose(file);
    return bytes;
}

static void set_up(struct job *j)
{
    j->chunk_bytes = (size_t)PERTA_CHUNK_ELEMS * j->width;
    size_t n_chunks = j->len_bytes / j->chunk_bytes + 1;
    size_t frames = n_chunks * perta_codec_bound(j->chunk_bytes);
    j->frames = room(frames);
    j->frame_bytes = calloc(n_chunks, sizeof *j->frame_bytes);
    j->coded = calloc(n_chunks, sizeof *j->coded);
    j->scratch = room(j->chunk_bytes);
    j->planes = room(j->chunk_bytes);
    j->out = room(j->chunk_bytes);
    j->codec = perta_codec_new(j->chunk_bytes);
    j->pack = ZSTD_createCCtx();
    j->unpack = ZSTD_createDCtx();
    if (!j->frame_bytes || !j->coded || !j->codec || !j->pack || !j->unpack)
        die("no memory");
}

int main(int argc, char **argv)
{
    static struct job j;
    static struct figures figures[N_CODERS];
    if (argc < 4 || !perta_dtype_parse(argv[1], &j.dtype))
        die("usage: bench_codec DTYPE BEFORE AFTER [ROUNDS]");
    int rounds = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 5;
    rounds = rounds < 1 ? 1 : rounds > ROUNDS_MAX ? ROUNDS_MAX : rounds;
    int n_coders = argc > 5 ? (int)strtol(argv[5], NULL, 10) : N_CODERS;
    n_coders = n_coders < 1 || n_coders > N_CODERS ? N_CODERS : n_coders;
    size_t after_bytes;
    j.width = perta_dtype_unit_bytes(j.dtype);
    j.before = load(argv[2], &j.len_bytes);
    j.after = load(argv[3], &after_bytes);
    if (after_bytes != j.len_bytes || j.len_bytes % j.width)
        die("two files of the same length, of whole units");
    set_up(&j);
    for (int round = 0; round < rounds; round++)
        for (int c = 0; c < n_coders; c++)
            run(&j, &coders[c], &figures[c], round);
    printf("{\"units\": %zu, \"unchanged\": %.4f", j.len_bytes / j.width, unchanged(&j));
    if (j.dtype == PERTA_BF16 || j.dtype == PERTA_F16) {
        unsigned shift = j.dtype == PERTA_BF16 ? 7 : 10;
        printf(", \"entropy\": %.4f, \"entropy_given_exponent\": %.4f", entropy(&j, false, shift),
               entropy(&j, true, shift));
    }
    printf(", \"rounds\": %d, \"coders\": {", rounds);
    for (int c = 0; c < n_coders; c++) {
        printf("%s\"%s\": {\"bits\": %.4f", c ? ", " : "", coders[c].name,
               8 * (double)figures[c].len_bytes / ((double)j.len_bytes / j.width));
        print_rate("encode_gb_s", figures[c].encode, rounds, j.len_bytes);
        print_rate("decode_gb_s", figures[c].decode, rounds, j.len_bytes);
        printf("}");
    }
    printf("}}\n");
    return 0;
}
