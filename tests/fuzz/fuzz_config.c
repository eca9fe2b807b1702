/* config.json of a model: parsing Python's JSON, and what it says about the architecture. */
#include <math.h>
#include <stdlib.h>

#include "estimators/model/config.h"
#include "estimators/model/weights.h"
#include "io/format/python_json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Tensors are asked for one by one, until the first that a checkpoint lacks. */
static int count_tensor(void *ctx, const char *name, const struct perta_tensor_shape *shape,
                        struct perta_err *err)
{
    unsigned *n = ctx;
    if (!*name || !shape->n_dims)
        __builtin_trap();
    for (size_t i = 0; i < shape->n_dims; i++)
        if (!shape->dims[i] || shape->dims[i] > 3 * (uint64_t)INT32_MAX * INT32_MAX)
            __builtin_trap();
    return ++*n < 100 ? 0 : perta_fail(err, PERTA_EINPUT, "many");
}

/* Pairs of elements are rotated, in layers with rotary positions. */
static bool is_even(const struct perta_llm *llm)
{
    uint32_t l = 0;
    while (l < llm->n_layers && perta_llm_has(llm, l, PERTA_LAYER_UNROTATED))
        l++;
    return l == llm->n_layers || !((llm->rotary_dim ? llm->rotary_dim : llm->head_dim) % 2);
}

static void check_frequencies(const struct perta_llm *llm)
{
    const size_t row = llm->head_dim / 2;
    float *freq = malloc((4 * row + 1) * sizeof *freq);
    perta_llm_rope_tables(llm, freq);
    for (size_t i = 0; i < 4; i++) {
        uint32_t n = llm->ropes[i % 2].rotated / 2;
        if (n > row)
            __builtin_trap();
        for (uint32_t j = 0; j < n; j++)
            if (isnan(freq[i * row + j]))
                __builtin_trap();
    }
    free(freq);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct perta_llm llm;
    struct perta_err err = {0};
    json_t *config;
    if (perta_python_json_parse((const char *)data, size, "config.json", &config, &err)) {
        if (config || err.code != PERTA_EINPUT || !err.msg[0])
            __builtin_trap();
        return 0;
    }
    int rc = perta_llm_parse(config, "config.json", &llm, &err);
    json_t *unknown = perta_llm_unknown_keys(config);
    if (!unknown)
        __builtin_trap();
    json_decref(unknown);
    json_decref(config);
    if (rc ? rc != PERTA_EINPUT || !err.msg[0]
           : !llm.n_kv_heads || llm.n_heads % llm.n_kv_heads || !is_even(&llm) ||
                 (llm.pad != PERTA_NO_PAD && llm.pad >= llm.vocab))
        __builtin_trap();
    if (rc)
        return 0;
    for (uint32_t l = 0; l < llm.n_layers; l++)
        if (!perta_llm_window(&llm, l))
            __builtin_trap();
    unsigned n = 0;
    perta_llm_each(&llm, count_tensor, &n, &err);
    if (llm.head_dim <= 1024)
        check_frequencies(&llm);
    return 0;
}
