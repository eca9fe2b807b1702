/* A quantised checkpoint. The input is config.json and, after a NUL, the header of
 * model.safetensors, to which this target adds the length and the data (a pattern of bytes). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/format/dequantise.h"
#include "io/format/quant_config.h"
#include "tests/fuzz/folder.h"

#define DATA_MAX (1 << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t pattern[DATA_MAX];

/* Where the data end according to the header. */
static size_t data_bytes(const char *header, size_t size)
{
    json_int_t end = 0;
    const char *name;
    json_t *root = json_loadb(header, size, 0, NULL), *tensor;
    json_object_foreach (root, name, tensor) {
        json_t *offsets = json_object_get(tensor, "data_offsets");
        json_int_t at = json_integer_value(json_array_get(offsets, 1));
        end = at > end ? at : end;
    }
    json_decref(root);
    return end > DATA_MAX ? DATA_MAX : (size_t)end;
}

/* Returns the number of bytes before the data. */
static uint64_t put_model(const uint8_t *data, size_t size)
{
    const uint8_t *nul = memchr(data, 0, size);
    size_t config = nul ? (size_t)(nul - data) : size;
    const uint8_t *header = nul ? nul + 1 : data;
    uint64_t n = nul ? size - config - 1 : 0;
    put_file("config.json", data, config);
    FILE *file = create("model.safetensors");
    put(file, &n, sizeof n);
    put(file, header, n);
    put(file, pattern, data_bytes((const char *)header, n));
    fclose(file);
    return n + sizeof n;
}

static void check_extent(const struct perta_extent *e, const struct perta_tensor *t)
{
    if (e->shard || e->off_bytes < t->off_bytes ||
        e->off_bytes + e->len_bytes > t->off_bytes + t->len_bytes)
        __builtin_trap();
}

/* Form n elements from copies, beyond whose ends nothing may be read or written. */
static void form(const struct perta_quant *q, uint64_t first, uint64_t n, uint64_t before,
                 const struct perta_checkpoint *ck)
{
    struct perta_extent codes, scales;
    struct perta_err err = {0};
    perta_quant_need(q, first, n, &codes, &scales);
    check_extent(&codes, &q->codes);
    check_extent(&scales, &q->scale);
    uint8_t *copies[2] = {malloc(codes.len_bytes), malloc(scales.len_bytes)};
    uint8_t *to = malloc(n * perta_dtype_unit_bytes(q->dtype));
    if (!copies[0] || !copies[1] || !to)
        abort();
    memcpy(copies[0], pattern + (codes.off_bytes - before), codes.len_bytes);
    memcpy(copies[1], pattern + (scales.off_bytes - before), scales.len_bytes);
    int rc = perta_quant_form(q, first, n, copies[0], copies[1], to, ck, &err);
    if (rc != err.code || (rc && !err.msg[0]))
        __builtin_trap();
    free(copies[0]);
    free(copies[1]);
    free(to);
}

static void use(const struct perta_dequantise *d, const struct perta_checkpoint *ck,
                uint64_t before)
{
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        const struct perta_tensor *t = ck->by_name[i].tensor;
        const struct perta_quant *q = perta_dequantise_find(d, ck, &ck->by_name[i]);
        if (q->coding == PERTA_CODING_NONE)
            continue;
        if (t->dtype != q->dtype || t->len_bytes != t->n_elems * perta_dtype_unit_bytes(t->dtype))
            __builtin_trap();
        uint64_t unit = perta_quant_unit(q);
        uint64_t step = unit > 1 ? unit : t->n_elems / 3 + 1;
        for (uint64_t at = 0, n; at < t->n_elems; at += n) {
            n = t->n_elems - at < step ? t->n_elems - at : step;
            form(q, at, n, before, ck);
        }
    }
    char *text;
    size_t len;
    struct perta_err err = {0};
    if (!perta_quant_config_cut(ck, &text, &len, &err))
        free(text);
    else if (!err.msg[0])
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct perta_checkpoint *ck;
    struct perta_dequantise *d = NULL;
    struct perta_err err = {0};
    if (!dir[0]) {
        make_folder();
        for (size_t i = 0; i < DATA_MAX; i++)
            pattern[i] = (uint8_t)(i * 37 % 125); /* no NaN, finite scales in every dtype */
    }
    uint64_t before = put_model(data, size);
    int rc = perta_checkpoint_open(dir, &ck, &err);
    if (!rc) {
        rc = perta_dequantise_open(ck, &d, &err);
        if (!rc && d)
            use(d, ck, before);
        perta_dequantise_close(d);
        perta_checkpoint_close(ck);
    }
    if (rc != err.code || (rc && !err.msg[0]))
        __builtin_trap();
    return 0;
}
