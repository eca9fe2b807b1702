#include "io/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/file.h"

#define PREFIX_BYTES 8
typedef unsigned long long ull;

/* ---- the length prefix ---- */

static int check_prefix(const uint8_t prefix[PREFIX_BYTES], uint64_t file_len_bytes,
                        const char *path, uint64_t *len_bytes, struct perta_err *err)
{
    uint64_t n;
    memcpy(&n, prefix, PREFIX_BYTES);
    n = le64toh(n);
    if (!memcmp(prefix, "version ", PREFIX_BYTES))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: a Git LFS pointer, not the file itself; run \"git lfs pull\" in "
                          "the model's folder",
                          path);
    if (n > PERTA_HEADER_MAX_BYTES)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: byte 0: not a safetensors file (header of %llu bytes, at most "
                          "%u are allowed)",
                          path, (ull)n, PERTA_HEADER_MAX_BYTES);
    if (n > file_len_bytes - PREFIX_BYTES)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: byte 0: header of %llu bytes reaches beyond the file's end at "
                          "byte %llu",
                          path, (ull)n, (ull)file_len_bytes);
    *len_bytes = PREFIX_BYTES + n;
    return 0;
}

static int too_short(uint64_t file_len_bytes, const char *path, struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT,
                      "%s: too short for a safetensors file: %llu bytes, at least %d are needed",
                      path, (ull)file_len_bytes, PREFIX_BYTES);
}

/* ---- one tensor ---- */

static int parse_shape(struct perta_tensor *t, const json_t *shape, const char *path,
                       struct perta_err *err)
{
    if (!json_is_array(shape))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no array \"shape\"", path, t->name);
    t->n_dims = (uint32_t)json_array_size(shape);
    t->shape = calloc(t->n_dims + 1, sizeof *t->shape);
    if (!t->shape)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    t->n_elems = 1;
    uint64_t product = 1; /* of the dimensions that are not zero: it must not overflow either */
    for (uint32_t i = 0; i < t->n_dims; i++) {
        const json_t *dim = json_array_get(shape, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: tensor %s: dimension %u is not a whole number from 0", path,
                              t->name, i);
        t->shape[i] = (uint64_t)json_integer_value(dim);
        if (t->shape[i] && perta_mul_overflows(product, t->shape[i], &product))
            return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: the shape's product overflows",
                              path, t->name);
        t->n_elems *= t->shape[i];
    }
    return 0;
}

static int parse_range(struct perta_tensor *t, const json_t *range, uint64_t header_bytes,
                       uint64_t file_len_bytes, const char *path, struct perta_err *err)
{
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: \"data_offsets\" is not [BEGIN, END] with "
                          "0 <= BEGIN <= END",
                          path, t->name);
    uint64_t data_bytes = file_len_bytes - header_bytes, end_bytes;
    end_bytes = (uint64_t)json_integer_value(end);
    if (end_bytes > data_bytes)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s ends at byte %llu, beyond the file's end at byte %llu; "
                          "the file is cut short, or the header is wrong",
                          path, t->name, (ull)(end_bytes + header_bytes), (ull)file_len_bytes);
    t->off_bytes = header_bytes + (uint64_t)json_integer_value(begin);
    t->len_bytes = header_bytes + end_bytes - t->off_bytes;
    return 0;
}

static int check_size(const struct perta_tensor *t, const char *path, struct perta_err *err)
{
    uint64_t bits;
    if (perta_mul_overflows(t->n_elems, perta_dtype_bits(t->dtype), &bits))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: the size in bits overflows", path,
                          t->name);
    if (bits % 8)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: %llu elements of %s are not a whole number of bytes",
                          path, t->name, (ull)t->n_elems, perta_dtype_name(t->dtype));
    if (bits / 8 != t->len_bytes)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s at byte %llu: %llu bytes, but its dtype %s and shape "
                          "take %llu",
                          path, t->name, (ull)t->off_bytes, (ull)t->len_bytes,
                          perta_dtype_name(t->dtype), (ull)(bits / 8));
    return 0;
}

static int parse_tensor(struct perta_tensor *t, const char *name, const json_t *info,
                        uint64_t header_bytes, uint64_t file_len_bytes, const char *path,
                        struct perta_err *err)
{
    t->name = strdup(name);
    if (!t->name)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    if (!json_is_object(info))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: its entry is not an object", path,
                          name);
    const char *dtype = json_string_value(json_object_get(info, "dtype"));
    if (!dtype)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no string \"dtype\"", path, name);
    if (!perta_dtype_parse(dtype, &t->dtype))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: unknown dtype \"%.40s\"", path,
                          name, dtype);
    int rc = parse_shape(t, json_object_get(info, "shape"), path, err);
    if (!rc)
        rc = parse_range(t, json_object_get(info, "data_offsets"), header_bytes, file_len_bytes,
                         path, err);
    return rc ? rc : check_size(t, path, err);
}

/* ---- the whole header ---- */

static int parse_metadata(struct perta_header *h, json_t *metadata, const char *path,
                          struct perta_err *err)
{
    if (json_is_null(metadata))
        return 0;
    if (!json_is_object(metadata))
        return perta_fail(err, PERTA_EINPUT, "%s: \"__metadata__\" is not an object", path);
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: \"__metadata__\": the value of \"%.200s\" is not a string",
                              path, key);
    }
    h->metadata = json_incref(metadata);
    return 0;
}

static int parse_tensors(struct perta_header *h, json_t *root, const char *path,
                         struct perta_err *err)
{
    h->tensors = calloc(json_object_size(root) + 1, sizeof *h->tensors);
    if (!h->tensors)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    const char *name;
    json_t *info;
    json_object_foreach(root, name, info) {
        int rc = !strcmp(name, "__metadata__")
                     ? parse_metadata(h, info, path, err)
                     : parse_tensor(&h->tensors[h->n_tensors++], name, info, h->len_bytes,
                                    h->file_len_bytes, path, err);
        if (rc)
            return rc;
    }
    return 0;
}

/* Merge sort, so that tensors at one offset (all but one of them empty) keep the JSON's order;
 * an empty one stands before the one that has bytes there. */
static bool stands_before(const struct perta_tensor *a, const struct perta_tensor *b)
{
    if (a->off_bytes != b->off_bytes)
        return a->off_bytes < b->off_bytes;
    return !a->len_bytes && b->len_bytes;
}

static void merge_sort(struct perta_tensor *t, struct perta_tensor *scratch, uint64_t n)
{
    if (n < 2)
        return;
    uint64_t half = n / 2, i = 0, j = half;
    merge_sort(t, scratch, half);
    merge_sort(t + half, scratch, n - half);
    for (uint64_t k = 0; k < n; k++)
        scratch[k] = j == n || (i < half && !stands_before(&t[j], &t[i])) ? t[i++] : t[j++];
    memcpy(t, scratch, n * sizeof *t);
}

static int sort_tensors(struct perta_header *h, const char *path, struct perta_err *err)
{
    struct perta_tensor *scratch = calloc(h->n_tensors + 1, sizeof *scratch);
    if (!scratch)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    merge_sort(h->tensors, scratch, h->n_tensors);
    free(scratch);
    return 0;
}

static int check_layout(const struct perta_header *h, const char *path, struct perta_err *err)
{
    uint64_t at = h->len_bytes;
    for (uint64_t i = 0; i < h->n_tensors; i++) {
        const struct perta_tensor *t = &h->tensors[i];
        if (t->off_bytes > at)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: byte %llu: a hole of %llu bytes before tensor %s", path,
                              (ull)at, (ull)(t->off_bytes - at), t->name);
        if (t->off_bytes < at)
            return perta_fail(err, PERTA_EINPUT, "%s: byte %llu: tensor %s overlaps tensor %s",
                              path, (ull)t->off_bytes, t->name, h->tensors[i - 1].name);
        at += t->len_bytes;
    }
    if (at != h->file_len_bytes)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: byte %llu: %llu bytes after the last tensor belong to none", path,
                          (ull)at, (ull)(h->file_len_bytes - at));
    return 0;
}

static int parse_json(struct perta_header *h, const char *path, struct perta_err *err)
{
    json_error_t where;
    json_t *root = json_loadb((const char *)h->bytes + PREFIX_BYTES, h->len_bytes - PREFIX_BYTES,
                              JSON_REJECT_DUPLICATES, &where);
    if (!root && json_error_code(&where) == json_error_out_of_memory)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    if (!root)
        return perta_fail(err, PERTA_EINPUT, "%s: byte %llu: the header is not valid JSON: %s",
                          path, (ull)(where.position < 0 ? 0 : where.position) + PREFIX_BYTES,
                          where.text);
    int rc = json_is_object(root)
                 ? parse_tensors(h, root, path, err)
                 : perta_fail(err, PERTA_EINPUT,
                              "%s: byte %d: the header is not a JSON object", path, PREFIX_BYTES);
    json_decref(root);
    return rc;
}

/* Takes over bytes, which hold the whole header. */
static int parse_owned(uint8_t *bytes, uint64_t len_bytes, uint64_t file_len_bytes,
                       const char *path, struct perta_header **out, struct perta_err *err)
{
    struct perta_header *h = calloc(1, sizeof *h);
    if (!h) {
        free(bytes);
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    }
    h->bytes = bytes;
    h->len_bytes = len_bytes;
    h->file_len_bytes = file_len_bytes;
    int rc = parse_json(h, path, err);
    if (!rc)
        rc = sort_tensors(h, path, err);
    if (!rc)
        rc = check_layout(h, path, err);
    if (rc) {
        perta_header_free(h);
        return rc;
    }
    *out = h;
    return 0;
}

int perta_safetensors_parse(const uint8_t *bytes, uint64_t len_bytes, uint64_t file_len_bytes,
                            const char *path, struct perta_header **out, struct perta_err *err)
{
    *out = NULL;
    if (file_len_bytes < PREFIX_BYTES || len_bytes < PREFIX_BYTES)
        return too_short(file_len_bytes, path, err);
    uint64_t header_bytes = 0;
    int rc = check_prefix(bytes, file_len_bytes, path, &header_bytes, err);
    if (rc)
        return rc;
    if (header_bytes > len_bytes)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: the header takes %llu bytes, only %llu are there", path,
                          (ull)header_bytes, (ull)len_bytes);
    uint8_t *copy = malloc(header_bytes);
    if (!copy)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    memcpy(copy, bytes, header_bytes);
    return parse_owned(copy, header_bytes, file_len_bytes, path, out, err);
}

int perta_safetensors_read(int fd, uint64_t file_len_bytes, const char *path,
                           struct perta_header **out, struct perta_err *err)
{
    *out = NULL;
    if (file_len_bytes < PREFIX_BYTES)
        return too_short(file_len_bytes, path, err);
    uint8_t prefix[PREFIX_BYTES];
    uint64_t header_bytes = 0;
    int rc = perta_pread_all(fd, prefix, sizeof prefix, 0, path, err);
    if (!rc)
        rc = check_prefix(prefix, file_len_bytes, path, &header_bytes, err);
    if (rc)
        return rc;
    uint8_t *bytes = malloc(header_bytes);
    if (!bytes)
        return perta_fail_sys(err, ENOMEM, "%s: header of %llu bytes", path, (ull)header_bytes);
    rc = perta_pread_all(fd, bytes, header_bytes, 0, path, err);
    if (rc) {
        free(bytes);
        return rc;
    }
    return parse_owned(bytes, header_bytes, file_len_bytes, path, out, err);
}

void perta_header_free(struct perta_header *header)
{
    if (!header)
        return;
    for (uint64_t i = 0; i < header->n_tensors; i++) {
        free(header->tensors[i].name);
        free(header->tensors[i].shape);
    }
    free(header->tensors);
    json_decref(header->metadata);
    free(header->bytes);
    free(header);
}

/* ---- comparing ---- */

bool perta_header_same(const struct perta_header *a, const struct perta_header *b)
{
    return a->file_len_bytes == b->file_len_bytes && a->len_bytes == b->len_bytes &&
           !memcmp(a->bytes, b->bytes, a->len_bytes);
}

bool perta_tensor_same(const struct perta_tensor *a, const struct perta_tensor *b)
{
    return !strcmp(a->name, b->name) && a->dtype == b->dtype && a->n_dims == b->n_dims &&
           (!a->n_dims || !memcmp(a->shape, b->shape, a->n_dims * sizeof *a->shape));
}

/* ---- building ---- */

static json_t *tensor_json(const struct perta_tensor *t, uint64_t begin)
{
    json_t *shape = json_array();
    for (uint32_t i = 0; i < t->n_dims; i++)
        json_array_append_new(shape, json_integer((json_int_t)t->shape[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", perta_dtype_name(t->dtype), "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)(begin + t->len_bytes));
}

static int lay_out(struct perta_tensor *tensors, uint64_t n, json_t *root, struct perta_err *err)
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
        if (json_object_get(root, t->name))
            return perta_fail(err, PERTA_EINPUT, "tensor %s: twice in one file", t->name);
        if (json_object_set_new(root, t->name, tensor_json(t, at)))
            return perta_fail(err, PERTA_EINPUT, "tensor %s: its name cannot be written",
                              t->name);
        at += t->len_bytes;
    }
    return 0;
}

static int print_header(const json_t *root, uint8_t **bytes, uint64_t *len_bytes,
                        struct perta_err *err)
{
    char *text = json_dumps(root, JSON_COMPACT);
    uint64_t text_bytes = text ? strlen(text) : 0;
    uint64_t n = perta_align_up(text_bytes, 8);
    uint8_t *to = text ? malloc(PREFIX_BYTES + n) : NULL;
    int rc = 0;
    if (!to)
        rc = perta_fail_sys(err, ENOMEM, "safetensors header");
    else if (n > PERTA_HEADER_MAX_BYTES)
        rc = perta_fail(err, PERTA_EINPUT,
                        "the header takes %llu bytes, at most %u are allowed; use more shards",
                        (ull)n, PERTA_HEADER_MAX_BYTES);
    if (rc) {
        free(text);
        free(to);
        return rc;
    }
    uint64_t prefix = htole64(n);
    memcpy(to, &prefix, PREFIX_BYTES);
    memcpy(to + PREFIX_BYTES, text, text_bytes);
    memset(to + PREFIX_BYTES + text_bytes, ' ', n - text_bytes);
    free(text);
    *bytes = to;
    *len_bytes = PREFIX_BYTES + n;
    return 0;
}

int perta_safetensors_build(struct perta_tensor *tensors, uint64_t n, const json_t *metadata,
                            uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err)
{
    json_t *root = json_object();
    if (metadata)
        json_object_set_new(root, "__metadata__", json_deep_copy(metadata));
    int rc = lay_out(tensors, n, root, err);
    if (!rc)
        rc = print_header(root, bytes, len_bytes, err);
    json_decref(root);
    for (uint64_t i = 0; i < n && !rc; i++)
        tensors[i].off_bytes += *len_bytes;
    return rc;
}
