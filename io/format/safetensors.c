#include "io/format/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/file.h"
#include "io/format/plain.h"

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

/* ---- names and shapes ---- */

/* Names and shapes take about ten bytes each, so they are allocated in blocks. */
#define WORDS_BYTES (64u << 10)

struct perta_words {
    struct perta_words *next;
    size_t used, room;
    uint64_t words[]; /* (room bytes) */
};

/* Allocate memory that lives as long as the header. NULL only when out of memory. */
static void *take_words(struct perta_header *h, size_t len_bytes)
{
    struct perta_words *w = h->words;
    len_bytes = perta_align_up(len_bytes, sizeof *w->words);
    if (!w || w->room - w->used < len_bytes) {
        size_t room = len_bytes > WORDS_BYTES ? len_bytes : WORDS_BYTES;
        w = malloc(sizeof *w + room);
        if (!w)
            return NULL;
        *w = (struct perta_words){.next = h->words, .room = room};
        h->words = w;
    }
    w->used += len_bytes;
    return (uint8_t *)w->words + w->used - len_bytes;
}

static bool set_name(struct perta_header *h, struct perta_tensor *t, const char *name, size_t len)
{
    t->name = take_words(h, len + 1);
    if (!t->name)
        return false;
    memcpy(t->name, name, len);
    t->name[len] = '\0';
    return true;
}

/* ---- one tensor ---- */

/* Compute n_elems from the shape. */
static int count_elems(struct perta_tensor *t, const char *path, struct perta_err *err)
{
    t->n_elems = 1;
    uint64_t product = 1; /* of the nonzero dimensions: must not overflow either */
    for (uint32_t i = 0; i < t->n_dims; i++) {
        if (t->shape[i] && perta_mul_overflows(product, t->shape[i], &product))
            return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: the shape's product overflows",
                              path, t->name);
        t->n_elems *= t->shape[i];
    }
    return 0;
}

static int parse_shape(struct perta_header *h, struct perta_tensor *t, const json_t *shape,
                       const char *path, struct perta_err *err)
{
    if (!json_is_array(shape))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no array \"shape\"", path, t->name);
    t->n_dims = (uint32_t)json_array_size(shape);
    t->shape = take_words(h, t->n_dims * sizeof *t->shape);
    if (!t->shape)
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    for (uint32_t i = 0; i < t->n_dims; i++) {
        const json_t *dim = json_array_get(shape, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: tensor %s: dimension %u is not a whole number from 0", path,
                              t->name, i);
        t->shape[i] = (uint64_t)json_integer_value(dim);
    }
    return count_elems(t, path, err);
}

/* Set the tensor's byte range; begin and end count from the end of the header. */
static int set_range(const struct perta_header *h, struct perta_tensor *t, uint64_t begin,
                     uint64_t end, const char *path, struct perta_err *err)
{
    if (end > h->file_len_bytes - h->len_bytes)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s ends at byte %llu, beyond the file's end at byte %llu; "
                          "the file is cut short, or the header is wrong",
                          path, t->name, (ull)(end + h->len_bytes), (ull)h->file_len_bytes);
    t->off_bytes = h->len_bytes + begin;
    t->len_bytes = end - begin;
    return 0;
}

static int parse_range(const struct perta_header *h, struct perta_tensor *t, const json_t *range,
                       const char *path, struct perta_err *err)
{
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: \"data_offsets\" is not [BEGIN, END] with "
                          "0 <= BEGIN <= END",
                          path, t->name);
    return set_range(h, t, (uint64_t)json_integer_value(begin), (uint64_t)json_integer_value(end),
                     path, err);
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

static int parse_tensor(struct perta_header *h, struct perta_tensor *t, const char *name,
                        const json_t *info, const char *path, struct perta_err *err)
{
    if (!set_name(h, t, name, strlen(name)))
        return perta_fail_sys(err, ENOMEM, "%s: header", path);
    if (!json_is_object(info))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: its entry is not an object", path,
                          name);
    const char *dtype = json_string_value(json_object_get(info, "dtype"));
    if (!dtype)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no string \"dtype\"", path, name);
    if (!perta_dtype_parse(dtype, &t->dtype))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: unknown dtype \"%.40s\"", path, name,
                          dtype);
    int rc = parse_shape(h, t, json_object_get(info, "shape"), path, err);
    if (!rc)
        rc = parse_range(h, t, json_object_get(info, "data_offsets"), path, err);
    return rc ? rc : check_size(t, path, err);
}

/* ---- the header's members ---- */

static int parse_metadata(struct perta_header *h, json_t *metadata, const char *path,
                          struct perta_err *err)
{
    if (json_is_null(metadata))
        return 0;
    if (!json_is_object(metadata))
        return perta_fail(err, PERTA_EINPUT, "%s: \"__metadata__\" is not an object", path);
    const char *key;
    json_t *value;
    json_object_foreach (metadata, key, value) {
        if (!json_is_string(value))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: \"__metadata__\": the value of \"%.200s\" is not a string", path,
                              key);
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
    json_object_foreach (root, name, info) {
        int rc = !strcmp(name, "__metadata__")
                     ? parse_metadata(h, info, path, err)
                     : parse_tensor(h, &h->tensors[h->n_tensors++], name, info, path, err);
        if (rc)
            return rc;
    }
    return 0;
}

/* Sort tensors by offset with a merge sort, which keeps the order of the JSON for tensors at the
 * same offset. All but one of those are empty; the empty ones come first. */
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

static bool stand_in_order(const struct perta_header *h)
{
    for (uint64_t i = 1; i < h->n_tensors; i++)
        if (stands_before(&h->tensors[i], &h->tensors[i - 1]))
            return false;
    return true;
}

static int sort_tensors(struct perta_header *h, const char *path, struct perta_err *err)
{
    if (stand_in_order(h))
        return 0;
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
                              "%s: byte %llu: a hole of %llu bytes before tensor %s", path, (ull)at,
                              (ull)(t->off_bytes - at), t->name);
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

/* ---- the usual layout, parsed without a tree ---- */

#define PLAIN_DIMS_MAX 16

static bool plain_dtype(struct perta_plain *p, enum perta_dtype *dtype)
{
    char name[16];
    const char *text;
    size_t len;
    if (!perta_plain_string(p, &text, &len) || len >= sizeof name)
        return false;
    memcpy(name, text, len);
    name[len] = '\0';
    return perta_dtype_parse(name, dtype);
}

static bool plain_shape(struct perta_header *h, struct perta_plain *p, struct perta_tensor *t)
{
    uint64_t dims[PLAIN_DIMS_MAX];
    if (!perta_plain_word(p, "["))
        return false;
    t->n_dims = 0;
    while (!perta_plain_word(p, "]")) {
        if (t->n_dims == PLAIN_DIMS_MAX || (t->n_dims && !perta_plain_word(p, ",")) ||
            !perta_plain_uint(p, &dims[t->n_dims]))
            return false;
        t->n_dims++;
    }
    t->shape = take_words(h, t->n_dims * sizeof *dims);
    if (t->shape)
        memcpy(t->shape, dims, t->n_dims * sizeof *dims);
    return t->shape;
}

/* Parse the value of a tensor's entry. */
static bool plain_tensor(struct perta_header *h, struct perta_plain *p, struct perta_tensor *t,
                         uint64_t *begin, uint64_t *end)
{
    return perta_plain_word(p, "{") && perta_plain_word(p, "\"dtype\"") &&
           perta_plain_word(p, ":") && plain_dtype(p, &t->dtype) && perta_plain_word(p, ",") &&
           perta_plain_word(p, "\"shape\"") && perta_plain_word(p, ":") && plain_shape(h, p, t) &&
           perta_plain_word(p, ",") && perta_plain_word(p, "\"data_offsets\"") &&
           perta_plain_word(p, ":") && perta_plain_word(p, "[") && perta_plain_uint(p, begin) &&
           perta_plain_word(p, ",") && perta_plain_uint(p, end) && perta_plain_word(p, "]") &&
           perta_plain_word(p, "}") && *begin <= *end;
}

/* Append an empty tensor. NULL only when out of memory. */
static struct perta_tensor *add_tensor(struct perta_header *h, uint64_t *room)
{
    if (h->n_tensors == *room) {
        uint64_t n = *room ? 2 * *room : 64;
        void *grown = realloc(h->tensors, n * sizeof *h->tensors);
        if (!grown)
            return NULL;
        h->tensors = grown;
        *room = n;
    }
    struct perta_tensor *t = &h->tensors[h->n_tensors++];
    *t = (struct perta_tensor){0};
    return t;
}

/* The parser's state. */
struct plain {
    struct perta_plain text;
    uint64_t room; /* allocated in h->tensors */
    bool had_metadata;
};

/* Parse one member. 1: unusual layout, or not valid; *err is not filled. */
static int parse_member(struct perta_header *h, struct plain *plain, const char *path,
                        struct perta_err *err)
{
    struct perta_plain *p = &plain->text;
    const char *name;
    size_t len;
    uint64_t begin, end;
    if (!perta_plain_string(p, &name, &len) || !perta_plain_word(p, ":"))
        return 1;
    if (perta_plain_is(name, len, "__metadata__")) {
        json_t *metadata;
        if (plain->had_metadata || !perta_plain_value(p, &metadata))
            return 1;
        plain->had_metadata = true;
        int rc = parse_metadata(h, metadata, path, err);
        json_decref(metadata);
        return rc;
    }
    struct perta_tensor *t = add_tensor(h, &plain->room);
    if (!t || !set_name(h, t, name, len) || !plain_tensor(h, p, t, &begin, &end))
        return 1;
    int rc = count_elems(t, path, err);
    if (!rc)
        rc = set_range(h, t, begin, end, path, err);
    return rc ? rc : check_size(t, path, err);
}

static int parse_plain(struct perta_header *h, const char *path, struct perta_err *err)
{
    struct plain plain = {
        .text = {(const char *)h->bytes + PREFIX_BYTES, (const char *)h->bytes + h->len_bytes}};
    struct perta_plain *p = &plain.text;
    if (!perta_plain_word(p, "{"))
        return 1;
    for (uint64_t i = 0; !perta_plain_word(p, "}"); i++) {
        if (i && !perta_plain_word(p, ","))
            return 1;
        int rc = parse_member(h, &plain, path, err);
        if (rc)
            return rc;
    }
    const char *twice;
    if (!perta_plain_word(p, "") || !perta_tensors_differ(h->tensors, h->n_tensors, &twice))
        return 1;
    if (h->n_tensors < plain.room) {
        void *cut = realloc(h->tensors, (h->n_tensors + 1) * sizeof *h->tensors);
        h->tensors = cut ? cut : h->tensors;
    }
    return 0;
}

/* ---- the whole header ---- */

static void release_tensors(struct perta_header *h)
{
    for (struct perta_words *w = h->words, *next; w; w = next) {
        next = w->next;
        free(w);
    }
    free(h->tensors);
    json_decref(h->metadata);
    h->words = NULL;
    h->tensors = NULL;
    h->metadata = NULL;
    h->n_tensors = 0;
}

/* Parse any valid JSON, as a tree. */
static int parse_tree(struct perta_header *h, const char *path, struct perta_err *err)
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
                 : perta_fail(err, PERTA_EINPUT, "%s: byte %d: the header is not a JSON object",
                              path, PREFIX_BYTES);
    json_decref(root);
    return rc;
}

static int parse_json(struct perta_header *h, const char *path, struct perta_err *err)
{
    int rc = parse_plain(h, path, err);
    if (rc <= 0)
        return rc;
    release_tensors(h);
    return parse_tree(h, path, err);
}

/* Parse the header in bytes, and take ownership of them. */
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
        return perta_fail(err, PERTA_EINPUT, "%s: the header takes %llu bytes, only %llu are there",
                          path, (ull)header_bytes, (ull)len_bytes);
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
    release_tensors(header);
    free(header->bytes);
    free(header);
}

/* ---- by name ---- */

static int by_name(const void *a, const void *b)
{
    const struct perta_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

const struct perta_tensor **perta_tensors_by_name(const struct perta_tensor *tensors, uint64_t n)
{
    const struct perta_tensor **list = calloc(n + 1, sizeof *list);
    bool sorted = true;
    for (uint64_t i = 0; list && i < n; i++) {
        list[i] = &tensors[i];
        sorted = sorted && (!i || by_name(&list[i - 1], &list[i]) < 0);
    }
    if (list && !sorted)
        qsort(list, n, sizeof *list, by_name);
    return list;
}

const struct perta_tensor **perta_header_match(const struct perta_header *from,
                                               const struct perta_header *to)
{
    uint64_t n = from->n_tensors;
    const struct perta_tensor **a = perta_tensors_by_name(from->tensors, n);
    const struct perta_tensor **b = perta_tensors_by_name(to->tensors, to->n_tensors);
    const struct perta_tensor **match = calloc(n + 1, sizeof *match);
    for (uint64_t i = 0; a && b && match && i < n; i++)
        match[a[i] - from->tensors] = b[i];
    if (!a || !b) {
        free(match);
        match = NULL;
    }
    free(a);
    free(b);
    return match;
}

bool perta_tensors_differ(const struct perta_tensor *tensors, uint64_t n, const char **twice)
{
    const struct perta_tensor **list = perta_tensors_by_name(tensors, n);
    *twice = NULL;
    for (uint64_t i = 1; list && !*twice && i < n; i++)
        if (!by_name(&list[i - 1], &list[i]))
            *twice = list[i]->name;
    bool differ = list && !*twice;
    free(list);
    return differ;
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
