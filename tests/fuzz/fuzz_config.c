/* config.json of a model: what it says of the architecture. */
#include <math.h>
#include <stdlib.h>

#include "estimators/backprop/config.h"
#include "estimators/backprop/weights.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Tensors are asked for one by one; the first that a checkpoint lacks ends it. */
static int count_tensor(void *ctx, const char *name, size_t rows, size_t cols,
                        struct perta_err *err)
{
    unsigned *n = ctx;
    if (!*name || !cols || rows > (uint64_t)INT32_MAX * INT32_MAX)
        __builtin_trap();
    return ++*n < 100 ? 0 : perta_fail(err, PERTA_EINPUT, "many");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct perta_llm llm;
    struct perta_err err = {0};
    json_t *config = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
    if (!config)
        return 0;
    int rc = perta_llm_parse(config, "config.json", &llm, &err);
    json_decref(config);
    if (rc ? rc != PERTA_EINPUT || !err.msg[0]
           : !llm.n_kv_heads || llm.n_heads % llm.n_kv_heads || llm.head_dim % 2)
        __builtin_trap();
    if (rc)
        return 0;
    unsigned n = 0;
    perta_llm_each(&llm, count_tensor, &n, &err);
    if (llm.head_dim > 1024)
        return 0;
    float *freq = malloc(llm.head_dim * sizeof *freq);
    perta_rope_frequencies(&llm, freq);
    for (uint32_t i = 0; i < llm.head_dim / 2; i++)
        if (isnan(freq[i]))
            __builtin_trap();
    free(freq);
    return 0;
}
