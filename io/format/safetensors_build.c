/* Build the header of a new file. It is printed directly: a tree of it would take ten times the
 * memory of the text. */
#include "io/format/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/text.h"

#define PREFIX_BYTES 8
typedef unsigned long long ull;

static int lay_out(struct perta_tensor *tensors, uint64_t n, struct perta_err *err)
{
    uint64_t at = 0, bits;
    for (uint64_t i = 0; i < n; i++) {
        struct perta_tensor *t = &tensors[i];
        if (perta_mul_overflows(t->n_elems, perta_dtype_bits(t->dtype), &bits) || bits % 8 ||
            at + bits / 8 > INT64_MAX)
            return perta_fail(err, PERTA_EINPUT, "tensor %s: its size cannot be written", t->name);
        t->off_bytes = at;
        t->len_bytes = bits / 8;
        at += t->len_bytes;
    }
    const char *twice;
    if (perta_tensors_differ(tensors, n, &twice))
        return 0;
    return twice ? perta_fail(err, PERTA_EINPUT, "tensor %s: twice in one file", twice)
                 : perta_fail_sys(err, ENOMEM, "safetensors header");
}

static int print_name(FILE *out, const char *name, struct perta_err *err)
{
    json_t *string = json_string(name);
    bool written = string || perta_text_is_plain(name); /* or out of memory */
    bool printed = string && !json_dumpf(string, out, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(string);
    return !written || !strcmp(name, "__metadata__")
               ? perta_fail(err, PERTA_EINPUT, "tensor %s: its name cannot be written", name)
           : printed ? 0
                     : perta_fail_sys(err, ENOMEM, "safetensors header");
}

static void print_entry(FILE *out, const struct perta_tensor *t)
{
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", perta_dtype_name(t->dtype));
    for (uint32_t i = 0; i < t->n_dims; i++)
        fprintf(out, "%s%llu", i ? "," : "", (ull)t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (ull)t->off_bytes,
            (ull)t->off_bytes + t->len_bytes);
}

struct header {
    const struct perta_tensor *tensors; /* (n) */
    uint64_t n;
    const json_t *metadata;
    struct perta_err *err;
    int rc;
};

/* Print room for the length prefix, then the JSON. */
static bool print_json(FILE *out, void *ctx)
{
    static const char prefix[PREFIX_BYTES];
    struct header *h = ctx;
    fwrite(prefix, 1, sizeof prefix, out);
    fputc('{', out);
    if (h->metadata) {
        fputs("\"__metadata__\":", out);
        if (json_dumpf(h->metadata, out, JSON_COMPACT))
            return false;
    }
    for (uint64_t i = 0; i < h->n; i++) {
        fputs(i || h->metadata ? "," : "", out);
        h->rc = print_name(out, h->tensors[i].name, h->err);
        if (h->rc)
            return false;
        print_entry(out, &h->tensors[i]);
    }
    fputc('}', out);
    return true;
}

/* Length prefix, JSON, and spaces up to a multiple of 8 bytes. */
static int print_header(const struct perta_tensor *tensors, uint64_t n, const json_t *metadata,
                        uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err)
{
    struct header h = {tensors, n, metadata, err, 0};
    size_t printed = 0;
    char *text = perta_text_print(print_json, &h, &printed);
    uint64_t size = perta_align_up(printed, 8);
    char *whole = text ? realloc(text, size) : NULL;
    if (!whole) {
        free(text);
        return h.rc ? h.rc : perta_fail_sys(err, ENOMEM, "safetensors header");
    }
    text = whole;
    memset(text + printed, ' ', size - printed);
    if (size - PREFIX_BYTES > PERTA_HEADER_MAX_BYTES) {
        free(text);
        return perta_fail(err, PERTA_EINPUT,
                          "the header takes %llu bytes, at most %u are allowed; use more shards",
                          (ull)(size - PREFIX_BYTES), PERTA_HEADER_MAX_BYTES);
    }
    uint64_t prefix = htole64(size - PREFIX_BYTES);
    memcpy(text, &prefix, sizeof prefix);
    *bytes = (uint8_t *)text;
    *len_bytes = size;
    return 0;
}

int perta_safetensors_build(struct perta_tensor *tensors, uint64_t n, const json_t *metadata,
                            uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err)
{
    int rc = lay_out(tensors, n, err);
    if (!rc)
        rc = print_header(tensors, n, metadata, bytes, len_bytes, err);
    for (uint64_t i = 0; i < n && !rc; i++)
        tensors[i].off_bytes += *len_bytes;
    return rc;
}
