/* The measures of an answer, from hand-made logits. */
#include <math.h>
#include <string.h>

#include "estimators/passes/measures.h"
#include "tests/unit.h"

#define V 4
#define MOST 16 /* labels */

static const float high[V] = {2, 0.5f, -1, 0}, flat[V] = {0.25f, 0.25f, 0.25f, 0.25f},
                   sure[V] = {90, 0, -3, 1};

/* Answers to one question, each label with the logits that it is predicted from. */
struct answer {
    struct perta_head head;
    size_t starts[2];
    int32_t target[MOST], best[MOST];
    float most[MOST], logit[MOST];
    double sums[MOST], moments[2 * MOST];
    const float *logits[MOST];
};

static void add(struct answer *a, const float *logits, int32_t target)
{
    size_t i = a->starts[1]++;
    int32_t best = 0;
    for (int32_t v = 1; v < V; v++)
        best = logits[v] > logits[best] ? v : best;
    a->logits[i] = logits;
    a->target[i] = target;
    a->best[i] = best;
    a->most[i] = logits[best];
    a->logit[i] = logits[target];
    for (size_t v = 0; v < V; v++) {
        double d = (double)logits[v] - (double)logits[best];
        a->sums[i] += exp(d);
        a->moments[2 * i] += exp(d) * d;
        a->moments[2 * i + 1] += exp(d) * d * d;
    }
}

static struct perta_measures measures(struct answer *a)
{
    struct perta_measures m;
    struct perta_err err = {0};
    a->head = (struct perta_head){.starts = a->starts,
                                  .target = a->target,
                                  .best = a->best,
                                  .most = a->most,
                                  .logit = a->logit,
                                  .sums = a->sums,
                                  .moments = a->moments};
    ck_assert_int_eq(perta_measures_of(&a->head, 0, &m, &err), 0);
    return m;
}

/* log p of one token. */
static double log_p(const float *logits, size_t at)
{
    double sum = 0;
    for (size_t v = 0; v < V; v++)
        sum += exp((double)logits[v]);
    return (double)logits[at] - log(sum);
}

/* (log p - its mean) / its standard deviation. */
static double score(const float *logits, size_t at)
{
    double mean = 0, square = 0;
    for (size_t v = 0; v < V; v++) {
        double lp = log_p(logits, v);
        mean += exp(lp) * lp;
        square += exp(lp) * lp * lp;
    }
    return (log_p(logits, at) - mean) / sqrt(fmax(square - mean * mean, 1e-6));
}

static void is(double have, double want)
{
    if (!(fabs(have - want) <= 1e-9 * fmax(1, fabs(want))))
        ck_abort_msg("%.12g, not %.12g", have, want);
}

/* Labels 1 .. 5 of high: right, wrong, right, wrong, and the last, which does not count. */
START_TEST(the_lowest_two_fifths_count)
{
    static const int32_t targets[] = {0, 2, 0, 1, 3, 0};
    struct answer a = {0};
    for (size_t i = 0; i < 6; i++)
        add(&a, high, targets[i]);
    struct perta_measures m = measures(&a);
    is(m.exact_memorization, 2.0 / 5);
    is(m.extraction_strength, 1.0 / 5);
    is(m.min_k, -(log_p(high, 2) + log_p(high, 3)) / 2);
    is(m.min_k_plus_plus, -(score(high, 2) + score(high, 3)) / 2);
}
END_TEST

START_TEST(extraction_begins_after_the_last_wrong_label)
{
    for (size_t wrong = 0; wrong <= 5; wrong++) {
        struct answer a = {0};
        for (size_t i = 0; i < 6; i++)
            add(&a, high, i < wrong ? 1 : i == 5 ? 2 : 0);
        is(measures(&a).extraction_strength, 1 - (double)(wrong < 5 ? wrong : 4) / 5);
        is(measures(&a).exact_memorization, 1 - (double)wrong / 5);
    }
}
END_TEST

START_TEST(a_variance_of_nothing_is_a_millionth)
{
    struct answer a = {0}, b = {0};
    add(&a, flat, 1); /* nothing to tell tokens by: as probable as the mean */
    add(&a, flat, 1);
    is(measures(&a).min_k_plus_plus, 0);
    is(measures(&a).min_k, log(V));
    add(&b, sure, 3); /* the deviation is 1e-3, not e^-44 */
    add(&b, sure, 0);
    is(measures(&b).min_k_plus_plus, 89 * 1e3);
    is(measures(&b).min_k, 89);
}
END_TEST

START_TEST(a_single_label_leaves_none)
{
    struct answer a = {0};
    add(&a, high, 0);
    struct perta_measures m = measures(&a);
    ck_assert(isnan(m.exact_memorization));
    ck_assert(m.extraction_strength == 0 && m.min_k == 0 && m.min_k_plus_plus == 0);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_test(tests, the_lowest_two_fifths_count);
    tcase_add_test(tests, extraction_begins_after_the_last_wrong_label);
    tcase_add_test(tests, a_variance_of_nothing_is_a_millionth);
    tcase_add_test(tests, a_single_label_leaves_none);
    return run_suite("measures", tests);
}
