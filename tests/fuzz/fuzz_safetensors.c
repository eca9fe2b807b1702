/* The header parser, on a file whose data may have any length. */
#include <string.h>

#include "io/format/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void need(bool holds)
{
    if (!holds)
        __builtin_trap();
}

/* The result must equal what a JSON library reads, whichever way the header was parsed. */
static void compare(const struct perta_header *h)
{
    json_t *root =
        json_loadb((const char *)h->bytes + 8, h->len_bytes - 8, JSON_REJECT_DUPLICATES, NULL);
    need(json_object_size(root) == h->n_tensors + (json_object_get(root, "__metadata__") ? 1 : 0));
    for (uint64_t i = 0; i < h->n_tensors; i++) {
        const struct perta_tensor *t = &h->tensors[i];
        const json_t *info = json_object_get(root, t->name);
        const json_t *shape = json_object_get(info, "shape");
        const json_t *range = json_object_get(info, "data_offsets");
        uint64_t begin = (uint64_t)json_integer_value(json_array_get(range, 0));
        uint64_t end = (uint64_t)json_integer_value(json_array_get(range, 1));
        need(
            !strcmp(json_string_value(json_object_get(info, "dtype")), perta_dtype_name(t->dtype)));
        need(json_array_size(shape) == t->n_dims);
        for (uint32_t d = 0; d < t->n_dims; d++)
            need((uint64_t)json_integer_value(json_array_get(shape, d)) == t->shape[d]);
        need(h->len_bytes + begin == t->off_bytes && end - begin == t->len_bytes);
    }
    json_decref(root);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* Data of 0 to 63 bytes follow a header that says where they start; otherwise the file is
     * complete. */
    for (uint64_t extra = 0; extra < 64; extra += 8) {
        struct perta_header *header;
        struct perta_err err = {0};
        if (!perta_safetensors_parse(data, size, size + extra, "f", &header, &err)) {
            compare(header);
            perta_header_free(header);
        } else if (!err.code || !err.msg[0]) {
            __builtin_trap();
        }
    }
    return 0;
}
