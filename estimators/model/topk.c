/* PyTorch (aten/src/ATen/native/TopKImpl.h) calls std::partial_sort where k is at most n / 64, and
 * otherwise std::nth_element and then std::sort on all but the last of the k. What these do with
 * equal elements follows from the algorithms of libstdc++, which PyTorch's Linux packages are built
 * with: selection with a heap, introselect and introsort. They are done here step by step, on pairs
 * of a number and its index. */
#include "estimators/model/topk.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>

struct item {
    float x;
    uint32_t index;
};

enum { SHORT = 16 }; /* introsort leaves runs of this length to the insertion sort */

static bool before(struct item a, struct item b)
{
    return (isnan(a.x) && !isnan(b.x)) || a.x > b.x;
}

static void swap(struct item *a, struct item *b)
{
    struct item old = *a;
    *a = *b;
    *b = old;
}

static unsigned log2_floor(size_t n)
{
    unsigned log = 0;
    while (n >>= 1)
        log++;
    return log;
}

/* ---- a heap, with the item that comes last at its top ---- */

/* Put x in place of what is at hole: the hole sinks to a leaf, then x rises from there. */
static void heap_put(struct item *heap, size_t n, size_t hole, struct item x)
{
    size_t top = hole;
    while (2 * hole + 2 < n) {
        size_t child = 2 * hole + 2;
        if (before(heap[child], heap[child - 1]))
            child--;
        heap[hole] = heap[child];
        hole = child;
    }
    if (2 * hole + 2 == n) { /* an only child */
        heap[hole] = heap[2 * hole + 1];
        hole = 2 * hole + 1;
    }
    while (hole > top && before(heap[(hole - 1) / 2], x)) {
        heap[hole] = heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    heap[hole] = x;
}

/* The first n of the items n .. end become those that come first among all, as a heap. */
static void heap_select(struct item *items, size_t n, size_t end)
{
    for (size_t i = n / 2; i-- > 0;)
        heap_put(items, n, i, items[i]);
    for (size_t i = n; i < end; i++) {
        if (!before(items[i], items[0]))
            continue;
        struct item x = items[i];
        items[i] = items[0];
        heap_put(items, n, 0, x);
    }
}

static void heap_sort(struct item *heap, size_t n)
{
    while (n-- > 1) {
        struct item x = heap[n];
        heap[n] = heap[0];
        heap_put(heap, n, 0, x);
    }
}

/* ---- quickselect and quicksort ---- */

static void insertion_sort(struct item *items, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        struct item x = items[i];
        size_t to = i;
        for (; to > 0 && before(x, items[to - 1]); to--)
            items[to] = items[to - 1];
        items[to] = x;
    }
}

/* The pivot goes to items[0]: the median of the second, the middle and the last. */
static void choose_pivot(struct item *items, size_t n)
{
    struct item *a = items + 1, *b = items + n / 2, *c = items + n - 1, *median;
    if (before(*a, *b))
        median = before(*b, *c) ? b : before(*a, *c) ? c : a;
    else
        median = before(*a, *c) ? a : before(*b, *c) ? c : b;
    swap(items, median);
}

/* Returns the start of the second part: no item of the first comes after one of the second. */
static size_t partition(struct item *items, size_t n)
{
    choose_pivot(items, n);
    size_t low = 1, high = n;
    while (true) {
        while (before(items[low], items[0]))
            low++;
        high--;
        while (before(items[0], items[high]))
            high--;
        if (low >= high)
            return low;
        swap(&items[low], &items[high]);
        low++;
    }
}

/* Introselect: the item that belongs at nth is there, and no item before it comes after it. */
static void select_nth(struct item *items, size_t n, size_t nth)
{
    for (unsigned depth = 2 * log2_floor(n); n > 3; depth--) {
        if (depth == 0) {
            heap_select(items, nth + 1, n);
            swap(&items[0], &items[nth]);
            return;
        }
        size_t cut = partition(items, n);
        if (cut <= nth) {
            items += cut;
            n -= cut;
            nth -= cut;
        } else {
            n = cut;
        }
    }
    insertion_sort(items, n);
}

/* Introsort, without its last step: parts of up to SHORT items are in order, not their items. */
static void sort_parts(struct item *items, size_t n, unsigned depth)
{
    for (; n > SHORT; depth--) {
        if (depth == 0) {
            heap_select(items, n, n);
            heap_sort(items, n);
            return;
        }
        size_t cut = partition(items, n);
        sort_parts(items + cut, n - cut, depth - 1);
        n = cut;
    }
}

static void sort(struct item *items, size_t n)
{
    sort_parts(items, n, 2 * log2_floor(n));
    insertion_sort(items, n);
}

void perta_topk(const float *x, size_t n, size_t k, uint32_t *which)
{
    struct item items[PERTA_TOPK_MAX];
    assert(k <= n && n <= PERTA_TOPK_MAX);
    if (k == 0)
        return;
    for (size_t i = 0; i < n; i++)
        items[i] = (struct item){x[i], (uint32_t)i};
    if (k * 64 <= n) {
        heap_select(items, k, n);
        heap_sort(items, k);
    } else {
        select_nth(items, n, k - 1);
        sort(items, k - 1);
    }
    for (size_t i = 0; i < k; i++)
        which[i] = items[i].index;
}
