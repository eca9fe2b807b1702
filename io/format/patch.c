#include "io/format/patch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/file.h"
#include "io/hash.h"

#define HEAD_MAGIC 0x184D2A50u
#define TABLE_MAGIC 0x184D2A5Eu
#define SKIPPABLE_BYTES 8 /* magic and length of a skippable frame */
#define TAG "PERTA\r\n\x1a"
#define TAG_BYTES 8
#define HEAD_BYTES 48 /* of the head frame's content, before the headers */
#define ENTRY_BYTES 48
#define DIGEST_BYTES 8
#define FOOTER_BYTES 24
#define FOOTER_MAGIC "PRTA"

typedef unsigned long long ull;

static void put(uint8_t **to, uint64_t value, unsigned bytes)
{
    for (unsigned b = 0; b < bytes; b++)
        *(*to)++ = (uint8_t)(value >> (8 * b));
}

static uint64_t get(const uint8_t **from, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned b = 0; b < bytes; b++)
        value |= (uint64_t)*(*from)++ << (8 * b);
    return value;
}

/* ---- building ---- */

uint64_t perta_patch_head_bytes(const struct perta_header *before, const struct perta_header *after)
{
    uint64_t after_bytes = perta_header_same(before, after) ? 0 : after->len_bytes;
    return SKIPPABLE_BYTES + HEAD_BYTES + before->len_bytes + after_bytes + DIGEST_BYTES;
}

int perta_patch_head_build(const struct perta_header *before, const struct perta_header *after,
                           uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err)
{
    uint64_t after_bytes = perta_header_same(before, after) ? 0 : after->len_bytes;
    *len_bytes = perta_patch_head_bytes(before, after);
    uint64_t content = *len_bytes - SKIPPABLE_BYTES;
    *bytes = malloc(*len_bytes);
    if (!*bytes)
        return perta_fail_sys(err, ENOMEM, "patch head of %llu bytes", (ull)*len_bytes);
    uint8_t *to = *bytes;
    put(&to, HEAD_MAGIC, 4);
    put(&to, content, 4);
    memcpy(to, TAG, TAG_BYTES);
    to += TAG_BYTES;
    put(&to, PERTA_PATCH_VERSION, 4);
    put(&to, 0, 4);
    put(&to, before->len_bytes, 8);
    put(&to, after_bytes, 8);
    put(&to, before->file_len_bytes, 8);
    put(&to, after->file_len_bytes, 8);
    memcpy(to, before->bytes, before->len_bytes);
    to += before->len_bytes;
    memcpy(to, after->bytes, after_bytes);
    to += after_bytes;
    put(&to, perta_hash64(*bytes + SKIPPABLE_BYTES, content - DIGEST_BYTES), 8);
    return 0;
}

int perta_patch_table_build(const struct perta_patch_entry *entries, uint64_t n, uint8_t **bytes,
                            uint64_t *len_bytes, struct perta_err *err)
{
    if (n > (UINT32_MAX - FOOTER_BYTES) / ENTRY_BYTES)
        return perta_fail(err, PERTA_EINPUT,
                          "a shard of %llu chunks is too large for one patch file; split it",
                          (ull)n);
    uint64_t content = n * ENTRY_BYTES + FOOTER_BYTES;
    *len_bytes = SKIPPABLE_BYTES + content;
    *bytes = malloc(*len_bytes);
    if (!*bytes)
        return perta_fail_sys(err, ENOMEM, "patch table of %llu bytes", (ull)*len_bytes);
    uint8_t *to = *bytes;
    put(&to, TABLE_MAGIC, 4);
    put(&to, content, 4);
    for (uint64_t i = 0; i < n; i++) {
        const struct perta_patch_entry *e = &entries[i];
        put(&to, e->frame_off, 8);
        put(&to, e->frame_bytes, 4);
        put(&to, e->payload_bytes, 4);
        put(&to, e->tensor, 4);
        put(&to, e->n_units, 4);
        put(&to, (uint64_t)e->encoding, 4);
        put(&to, 0, 4);
        put(&to, e->hash_before, 8);
        put(&to, e->hash_after, 8);
    }
    put(&to, n, 8);
    put(&to, perta_hash64(*bytes + SKIPPABLE_BYTES, n * ENTRY_BYTES), 8);
    put(&to, PERTA_PATCH_VERSION, 4);
    memcpy(to, FOOTER_MAGIC, 4);
    return 0;
}

/* ---- parsing ---- */

/* The patch file: in memory, or open. */
struct source {
    const uint8_t *bytes; /* NULL: read from fd */
    int fd;
    uint64_t len_bytes;
    const char *path;
    struct perta_err *damage; /* NULL: a wrong digest is an error */
};

static int damaged(const struct source *src, uint64_t at, const char *what, struct perta_err *err)
{
    return perta_fail(err, PERTA_ECHECK, "%s: byte %llu: the patch is damaged: %s", src->path,
                      (ull)at, what);
}

static int wrong_digest(const struct source *src, uint64_t at, const char *what,
                        struct perta_err *err)
{
    if (!src->damage)
        return damaged(src, at, what, err);
    size_t len = strlen(src->damage->msg);
    if (len)
        snprintf(src->damage->msg + len, sizeof src->damage->msg - len, "; byte %llu: %s", (ull)at,
                 what);
    damaged(src, at, what, src->damage); /* does nothing if it is filled already */
    return 0;
}

static int fetch(const struct source *src, uint64_t off, uint64_t len, uint8_t *to,
                 struct perta_err *err)
{
    if (off > src->len_bytes || len > src->len_bytes - off)
        return damaged(src, src->len_bytes, "it ends too early", err);
    if (!src->bytes)
        return perta_pread_all(src->fd, to, len, off, src->path, err);
    memcpy(to, src->bytes + off, len);
    return 0;
}

static int fetch_new(const struct source *src, uint64_t off, uint64_t len, uint8_t **to,
                     struct perta_err *err)
{
    if (off > src->len_bytes || len > src->len_bytes - off)
        return damaged(src, src->len_bytes, "it ends too early", err);
    *to = malloc(len + 1);
    return *to ? fetch(src, off, len, *to, err)
               : perta_fail_sys(err, ENOMEM, "%s: %llu bytes", src->path, (ull)len);
}

struct head {
    uint64_t content_bytes;
    uint32_t version;
    uint64_t before_bytes, after_bytes, before_file_bytes, after_file_bytes;
};

static int read_fixed_head(const struct source *src, struct head *head, struct perta_err *err)
{
    uint8_t fixed[SKIPPABLE_BYTES + HEAD_BYTES];
    const uint8_t *from = fixed;
    if (src->len_bytes < sizeof fixed)
        return perta_fail(err, PERTA_EINPUT, "%s: not a perta patch: only %llu bytes", src->path,
                          (ull)src->len_bytes);
    int rc = fetch(src, 0, sizeof fixed, fixed, err);
    if (rc)
        return rc;
    uint64_t magic = get(&from, 4);
    head->content_bytes = get(&from, 4);
    if (magic != HEAD_MAGIC || memcmp(from, TAG, TAG_BYTES))
        return perta_fail(err, PERTA_EINPUT, "%s: byte 0: not a perta patch", src->path);
    from += TAG_BYTES;
    head->version = (uint32_t)get(&from, 4);
    uint64_t flags = get(&from, 4);
    if (head->version != PERTA_PATCH_VERSION || flags)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: byte 16: patch format %u, flags %llu; this perta reads format %u, "
                          "flags 0",
                          src->path, head->version, (ull)flags, PERTA_PATCH_VERSION);
    head->before_bytes = get(&from, 8);
    head->after_bytes = get(&from, 8);
    head->before_file_bytes = get(&from, 8);
    head->after_file_bytes = get(&from, 8);
    uint64_t sum;
    if (perta_add_overflows(head->before_bytes, head->after_bytes, &sum) ||
        perta_add_overflows(sum, HEAD_BYTES + DIGEST_BYTES, &sum) || sum != head->content_bytes)
        return damaged(src, 4, "the lengths in its head do not add up", err);
    return 0;
}

static int read_headers(const struct source *src, struct perta_patch *patch, struct perta_err *err)
{
    struct head head = {0};
    uint8_t *content = NULL;
    int rc = read_fixed_head(src, &head, err);
    if (!rc)
        rc = fetch_new(src, SKIPPABLE_BYTES, head.content_bytes, &content, err);
    if (rc)
        goto out;
    const uint8_t *digest = content + head.content_bytes - DIGEST_BYTES;
    if (perta_hash64(content, head.content_bytes - DIGEST_BYTES) != get(&digest, 8))
        rc = wrong_digest(src, SKIPPABLE_BYTES, "the digest of its head differs", err);
    if (rc)
        goto out;
    patch->head_bytes = SKIPPABLE_BYTES + head.content_bytes;
    rc = perta_safetensors_parse(content + HEAD_BYTES, head.before_bytes, head.before_file_bytes,
                                 src->path, &patch->before, err);
    patch->after = patch->before;
    if (!rc && head.after_bytes) {
        patch->after = NULL;
        rc = perta_safetensors_parse(content + HEAD_BYTES + head.before_bytes, head.after_bytes,
                                     head.after_file_bytes, src->path, &patch->after, err);
    }
    if (!rc && !head.after_bytes && head.before_file_bytes != head.after_file_bytes)
        rc = damaged(src, 32, "it has one header, but two lengths of the shard's file", err);
    if (rc)
        perta_err_context(err, "header in the patch");
out:
    free(content);
    return rc;
}

static int check_headers(const struct source *src, const struct perta_patch *patch,
                         struct perta_err *err)
{
    if (patch->before == patch->after)
        return 0;
    uint64_t n = patch->before->n_tensors;
    if (n != patch->after->n_tensors)
        return damaged(src, SKIPPABLE_BYTES, "its two headers differ in tensors", err);
    const struct perta_tensor **a = perta_tensors_by_name(patch->before->tensors, n);
    const struct perta_tensor **b = perta_tensors_by_name(patch->after->tensors, n);
    int rc = a && b ? 0 : perta_fail_sys(err, ENOMEM, "%s", src->path);
    for (uint64_t i = 0; !rc && i < n; i++)
        if (!perta_tensor_same(a[i], b[i]))
            rc = perta_fail(err, PERTA_ECHECK,
                            "%s: the patch is damaged: its two headers differ at tensor %s",
                            src->path, a[i]->name);
    free(a);
    free(b);
    return rc;
}

static int read_footer(const struct source *src, struct perta_patch *patch, uint64_t *digest,
                       struct perta_err *err)
{
    uint8_t footer[FOOTER_BYTES], frame[SKIPPABLE_BYTES];
    const uint8_t *from = footer;
    if (src->len_bytes - patch->head_bytes < SKIPPABLE_BYTES + FOOTER_BYTES)
        return damaged(src, src->len_bytes, "it ends too early", err);
    int rc = fetch(src, src->len_bytes - FOOTER_BYTES, FOOTER_BYTES, footer, err);
    if (rc)
        return rc;
    patch->n_entries = get(&from, 8);
    *digest = get(&from, 8);
    uint64_t version = get(&from, 4), table_bytes;
    if (memcmp(from, FOOTER_MAGIC, 4) || version != PERTA_PATCH_VERSION)
        return damaged(src, src->len_bytes - FOOTER_BYTES, "no table at its end; is it cut short?",
                       err);
    if (perta_mul_overflows(patch->n_entries, ENTRY_BYTES, &table_bytes) ||
        perta_add_overflows(table_bytes, SKIPPABLE_BYTES + FOOTER_BYTES, &table_bytes) ||
        table_bytes > src->len_bytes - patch->head_bytes)
        return damaged(src, src->len_bytes - FOOTER_BYTES, "its table is too long", err);
    patch->table_off = src->len_bytes - table_bytes;
    rc = fetch(src, patch->table_off, sizeof frame, frame, err);
    from = frame;
    if (!rc && (get(&from, 4) != TABLE_MAGIC || get(&from, 4) != table_bytes - SKIPPABLE_BYTES))
        rc = damaged(src, patch->table_off, "no table there", err);
    return rc;
}

static int read_entries(const struct source *src, struct perta_patch *patch, struct perta_err *err)
{
    uint64_t digest = 0;
    uint8_t *table = NULL;
    int rc = read_footer(src, patch, &digest, err);
    if (!rc)
        rc = fetch_new(src, patch->table_off + SKIPPABLE_BYTES, patch->n_entries * ENTRY_BYTES,
                       &table, err);
    if (!rc && perta_hash64(table, patch->n_entries * ENTRY_BYTES) != digest)
        rc = wrong_digest(src, patch->table_off, "the digest of its table differs", err);
    if (!rc && !(patch->entries = calloc(patch->n_entries + 1, sizeof *patch->entries)))
        rc = perta_fail_sys(err, ENOMEM, "%s: table", src->path);
    const uint8_t *from = table;
    for (uint64_t i = 0; !rc && i < patch->n_entries; i++) {
        struct perta_patch_entry *e = &patch->entries[i];
        e->frame_off = get(&from, 8);
        e->frame_bytes = (uint32_t)get(&from, 4);
        e->payload_bytes = (uint32_t)get(&from, 4);
        e->tensor = (uint32_t)get(&from, 4);
        e->n_units = (uint32_t)get(&from, 4);
        uint64_t encoding = get(&from, 4), zero = get(&from, 4);
        e->encoding = (enum perta_encoding)encoding;
        e->hash_before = get(&from, 8);
        e->hash_after = get(&from, 8);
        if (encoding >= PERTA_N_ENCODINGS || zero)
            rc = damaged(src, patch->table_off + SKIPPABLE_BYTES + i * ENTRY_BYTES,
                         "unknown encoding", err);
    }
    free(table);
    return rc;
}

static const char *wrong_frame(const struct perta_patch_entry *e, uint64_t frames_at,
                               uint64_t chunk_bytes)
{
    if (e->encoding == PERTA_ENC_ZERO)
        return e->frame_off || e->frame_bytes || e->payload_bytes || e->hash_before != e->hash_after
                   ? "a chunk without change has a frame"
                   : NULL;
    if (e->frame_off != frames_at || !e->frame_bytes)
        return "frames do not follow one another";
    if (e->frame_bytes > perta_codec_bound(chunk_bytes) ||
        e->payload_bytes > perta_codec_payload_max(chunk_bytes))
        return "a frame is longer than its chunk can need";
    return NULL;
}

/* Do entries cover the tensors of after in order, and frames the bytes from head to table? */
static int check_entries(const struct source *src, const struct perta_patch *patch,
                         struct perta_err *err)
{
    uint64_t at = patch->head_bytes, i = 0;
    for (uint64_t t = 0; t < patch->after->n_tensors; t++) {
        const struct perta_tensor *tensor = &patch->after->tensors[t];
        uint64_t width = perta_dtype_unit_bytes(tensor->dtype);
        uint64_t left = tensor->len_bytes / width;
        for (; left; i++) {
            uint64_t n = left < PERTA_CHUNK_ELEMS ? left : PERTA_CHUNK_ELEMS;
            const struct perta_patch_entry *e = &patch->entries[i];
            uint64_t byte = patch->table_off + SKIPPABLE_BYTES + i * ENTRY_BYTES;
            if (i == patch->n_entries || e->tensor != t || e->n_units != n)
                return damaged(src, byte, "its table does not cover the tensors in order", err);
            const char *wrong = wrong_frame(e, at, n * width);
            if (wrong)
                return damaged(src, byte, wrong, err);
            at += e->frame_bytes;
            left -= n;
        }
    }
    if (i != patch->n_entries)
        return damaged(src, patch->table_off, "its table has too many entries", err);
    if (at != patch->table_off)
        return damaged(src, at, "frames do not reach to the table", err);
    return 0;
}

static int parse(const struct source *src, struct perta_patch **out, struct perta_err *err)
{
    *out = NULL;
    struct perta_patch *patch = calloc(1, sizeof *patch);
    if (!patch)
        return perta_fail_sys(err, ENOMEM, "%s", src->path);
    patch->file_bytes = src->len_bytes;
    int rc = read_headers(src, patch, err);
    if (!rc)
        rc = check_headers(src, patch, err);
    if (!rc)
        rc = read_entries(src, patch, err);
    if (!rc)
        rc = check_entries(src, patch, err);
    if (rc) {
        perta_patch_free(patch);
        return rc;
    }
    *out = patch;
    return 0;
}

int perta_patch_parse(const uint8_t *bytes, uint64_t len_bytes, const char *path,
                      struct perta_patch **out, struct perta_err *err)
{
    return parse(&(struct source){.bytes = bytes, .len_bytes = len_bytes, .path = path}, out, err);
}

int perta_patch_read(int fd, uint64_t file_bytes, const char *path, struct perta_err *damage,
                     struct perta_patch **out, struct perta_err *err)
{
    return parse(
        &(struct source){.fd = fd, .len_bytes = file_bytes, .path = path, .damage = damage}, out,
        err);
}

void perta_patch_free(struct perta_patch *patch)
{
    if (!patch)
        return;
    if (patch->after != patch->before)
        perta_header_free(patch->after);
    perta_header_free(patch->before);
    free(patch->entries);
    free(patch);
}
