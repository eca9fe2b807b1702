/* Matrix products: close to products in double, and the same bits for every number of workers and
 * every address. Also where rows are cut. */
#include "estimators/compute/gemm.h"

#include <math.h>

#include "estimators/compute/cut.h"
#include "tests/gradient.h"

static struct perta_err err;

/* Sizes that are multiples of nothing; more columns than a tile has. */
#define M 300
#define N 530
#define K 150
static const size_t starts[] = {0, 1, 40, 256, 300};

static void product_double(double *c, const double *a, const double *b)
{
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            c[i * N + j] = 0;
            for (size_t k = 0; k < K; k++)
                c[i * N + j] += a[i * K + k] * b[j * K + k];
        }
}

/* c = a b^T, with that many workers, of operands that begin at offset shift. */
static void multiply(bool bf16, unsigned n_workers, size_t shift, const float *a, const float *b,
                     float *c)
{
    struct perta_workers *workers;
    struct perta_gemm *gemm;
    const struct perta_runs rows = {4, starts, 0};
    float *as = alloc(((M + PERTA_SLACK_ROWS) * K + shift) * sizeof *as);
    float *bs = alloc((N * K + shift) * sizeof *bs);
    memcpy(as + shift, a, M * K * sizeof *a);
    memcpy(bs + shift, b, N * K * sizeof *b);
    for (size_t i = M * K; i < (M + PERTA_SLACK_ROWS) * K; i++)
        as[shift + i] = NAN; /* nothing after the operands is used */
    ck_assert_ok(perta_workers_open(n_workers, &workers, &err));
    ck_assert_ok(
        perta_gemm_open(bf16, workers, (M + N + 2 * PERTA_SLACK_ROWS + 4) * K, 0, &gemm, &err));
    ck_assert_ok(perta_gemm_run(gemm, &rows, M, N, K, perta_matrix(as + shift, K),
                                perta_transposed(perta_matrix(bs + shift, K)), c, N, false, &err));
    perta_gemm_close(gemm);
    perta_workers_close(workers);
    free(as);
    free(bs);
}

START_TEST(the_same_bits_for_every_number_of_workers)
{
    bool bf16 = _i;
    if (bf16 && !perta_gemm_can_bf16())
        return;
    struct pair a = pair(M * K, 1), b = pair(N * K, 2);
    float *want = alloc(M * N * sizeof *want), *have = alloc(M * N * sizeof *have);
    double *exact = alloc(M * N * sizeof *exact), error = 0, norm = 0;
    product_double(exact, a.d, b.d);
    multiply(bf16, 1, 0, a.f, b.f, want);
    for (size_t i = 0; i < M * N; i++) {
        error += ((double)want[i] - exact[i]) * ((double)want[i] - exact[i]);
        norm += exact[i] * exact[i];
    }
    ck_assert_double_lt(sqrt(error / norm), bf16 ? 5e-3 : 1e-6);
    const unsigned workers[] = {2, 3, 5, 16};
    for (size_t w = 0; w < 4; w++) {
        multiply(bf16, workers[w], w, a.f, b.f, have);
        ck_assert_mem_eq(have, want, M * N * sizeof *have);
    }
    release(a);
    release(b);
    free(want);
    free(have);
    free(exact);
}
END_TEST

/* Adds once to what is there, in whole and in partial tiles; the columns beside them stay
 * unchanged. */
START_TEST(products_add)
{
    struct perta_workers *workers;
    struct perta_gemm *gemm;
    const struct perta_runs rows = {4, starts, 0};
    struct pair a = pair((M + PERTA_SLACK_ROWS) * K, 3), b = pair(N * K, 4);
    const struct perta_operand_matrix bt = perta_transposed(perta_matrix(b.f, K));
    float *c = alloc(M * (N + 1) * sizeof *c), *sum = alloc(M * (N + 1) * sizeof *sum);
    for (size_t i = 0; i < M * (N + 1); i++)
        sum[i] = 3;
    ck_assert_ok(perta_workers_open(2, &workers, &err));
    ck_assert_ok(perta_gemm_open(false, workers, 0, 0, &gemm, &err));
    ck_assert_ok(
        perta_gemm_run(gemm, &rows, M, N, K, perta_matrix(a.f, K), bt, c, N + 1, false, &err));
    ck_assert_ok(
        perta_gemm_run(gemm, &rows, M, N, K, perta_matrix(a.f, K), bt, sum, N + 1, true, &err));
    for (size_t i = 0; i < M; i++) {
        for (size_t j = 0; j < N; j++)
            ck_assert_double_lt(fabs((double)sum[i * (N + 1) + j] - (double)c[i * (N + 1) + j] - 3),
                                1e-4);
        ck_assert(c[i * (N + 1) + N] == 0 && sum[i * (N + 1) + N] == 3);
    }
    perta_gemm_close(gemm);
    perta_workers_close(workers);
    release(a);
    release(b);
    free(c);
    free(sum);
}
END_TEST

/* ---- where rows are cut ---- */

/* Samples of 100, 100, 100, 700, 3 and 5 rows, in groups of at most 256. */
static const size_t samples[] = {0, 100, 200, 300, 1000, 1003, 1008};

START_TEST(groups_are_whole_samples_and_tiles_are_theirs)
{
    struct perta_cut cut;
    const size_t groups[] = {0, 200, 300, 1000, 1008};
    const size_t tiles[] = {0, 200, 300, 556, 812, 1000, 1008};
    ck_assert_ok(perta_cut_make(samples, 6, 256, &cut, &err));
    ck_assert_uint_eq(cut.n_groups, 4);
    ck_assert_uint_eq(cut.n_tiles, 6);
    ck_assert_mem_eq(cut.groups, groups, sizeof groups);
    ck_assert_mem_eq(cut.tiles, tiles, sizeof tiles);
    ck_assert_uint_eq(cut.longest, 700);
    const size_t rows[] = {1, 300, 1000, 5000}; /* at most that many in a batch */
    for (size_t r = 0; r < 4; r++)
        for (size_t group = 0, at = 0, sample = 0; group < cut.n_groups;) {
            struct perta_cut_batch b = perta_cut_batch(&cut, group, rows[r]);
            ck_assert(b.first_row == at && b.first_sample == sample && b.end > group);
            ck_assert(b.n <= rows[r] || b.end == group + 1);
            ck_assert_uint_eq(b.tiles.starts[0] - b.tiles.origin, 0);
            ck_assert_uint_eq(b.tiles.starts[b.tiles.n] - b.tiles.origin, b.n);
            at += b.n;
            sample += b.n_samples;
            group = b.end;
        }
    perta_cut_release(&cut);
}
END_TEST

START_TEST(chunks_lie_in_one_run)
{
    struct perta_chunks chunks;
    const size_t long_ones[] = {0, 3, 3000, 3016};
    for (int by_sample = 0; by_sample < 2; by_sample++) {
        size_t row = 0, at = 0;
        ck_assert_ok(perta_chunks_make(long_ones, 3, by_sample, &chunks, &err));
        ck_assert_uint_eq(chunks.n, 5);
        ck_assert(chunks.parts == by_sample);
        for (size_t i = 0; i < chunks.n; i++) {
            const struct perta_chunk *c = &chunks.of[i];
            ck_assert(c->first == row && c->at == at && c->n <= PERTA_CHUNK_ROWS);
            ck_assert(c->begins == (!by_sample || (i != 2 && i != 3)));
            ck_assert(c->ends == (!by_sample || (i != 1 && i != 2)));
            row += c->n;
            at += perta_chunk_padded(c->n);
        }
        ck_assert_uint_eq(row, 3016);
        perta_chunks_release(&chunks);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_loop_test(tests, the_same_bits_for_every_number_of_workers, 0, 2);
    tcase_add_test(tests, products_add);
    tcase_add_test(tests, groups_are_whole_samples_and_tiles_are_theirs);
    tcase_add_test(tests, chunks_lie_in_one_run);
    return run_suite("gemm", tests);
}
