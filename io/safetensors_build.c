/* The header of a new file. Written as it goes: a tree of it would take ten times the text. */
#include "io/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"

#define PREFIX_BYTES 8
typedef unsigned long long ull;

static int lay_out(struct perta_tensor *tensors, uint64_t n, struct perta_err *err)
{
    uint64_t at = 0, bits;
    for (uint64_t i = 0; i < n; i++) {
        struct perta_tensor *t = &tensors[i];
        if (perta_mul_overflows(t->n_elems, perta_dtype_bits(t->dtype), &bits) || bits % 8 ||
            at + bits / 8 > INT64_MAX)
            return perta_fail(err, PERTA_EINPUT, "tensor %s: its size cannot be written",
                              t->name);
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

/* False: it is not UTF-8. */
static bool print_name(FILE *out, const char *name)
{
    json_t *string = json_string(name);
    bool printed = string && !json_dumpf(string, out, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(string);
    return printed && strcmp(name, "__metadata__") != 0;
}

static void print_entry(FILE *out, const struct perta_tensor *t)
{
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", perta_dtype_name(t->dtype));
    for (uint32_t i = 0; i < t->n_dims; i++)
        fprintf(out, "%s%llu", i ? "," : "", (ull)t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (ull)t->off_bytes,
            (ull)(t->off_bytes + t->len_bytes));
}

static int print_json(FILE *out, const struct perta_tensor *tensors, uint64_t n,
                      const json_t *metadata, struct perta_err *err)
{
    fputc('{', out);
    if (metadata) {
        fputs("\"__metadata__\":", out);
        json_dumpf(metadata, out, JSON_COMPACT);
    }
    for (uint64_t i = 0; i < n; i++) {
        fputs(i || metadata ? "," : "", out);
        if (!print_name(out, tensors[i].name))
            return perta_fail(err, PERTA_EINPUT, "tensor %s: its name cannot be written",
                              tensors[i].name);
        print_entry(out, &tensors[i]);
    }
    fputc('}', out);
    return 0;
}

/* Room for the prefix, the JSON, and spaces up to a multiple of 8 bytes. */
static int print_header(const struct perta_tensor *tensors, uint64_t n, const json_t *metadata,
                        uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err)
{
    char *text = NULL;
    size_t size = 0;
    uint64_t prefix = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return perta_fail_sys(err, ENOMEM, "safetensors header");
    fwrite(&prefix, 1, sizeof prefix, out);
    int rc = print_json(out, tensors, n, metadata, err);
    for (long at = ftell(out); !rc && at % 8; at++)
        fputc(' ', out);
    if ((ferror(out) | fclose(out)) && !rc)
        rc = perta_fail_sys(err, ENOMEM, "safetensors header");
    if (!rc && size - PREFIX_BYTES > PERTA_HEADER_MAX_BYTES)
        rc = perta_fail(err, PERTA_EINPUT,
                        "the header takes %llu bytes, at most %u are allowed; use more shards",
                        (ull)(size - PREFIX_BYTES), PERTA_HEADER_MAX_BYTES);
    if (rc) {
        free(text);
        return rc;
    }
    prefix = htole64(size - PREFIX_BYTES);
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
