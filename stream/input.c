#include "stream/input.h"

#include <errno.h>
#include <stdlib.h>

#include "io/text.h"

int perta_input_open(struct perta_input *input, const char *role, const char *path,
                     struct perta_err *err)
{
    *input = (struct perta_input){.role = role};
    int rc = perta_checkpoint_open(path, &input->ck, err);
    return rc ? perta_err_context(err, "%s", role) : 0;
}

int perta_input_open_files(struct perta_input *input, bool direct, struct perta_err *err)
{
    uint32_t n = input->ck->n_shards;
    input->files = calloc(n ? n : 1, sizeof *input->files);
    input->digests = calloc(n ? n : 1, sizeof *input->digests);
    input->seen_bytes = calloc(n ? n : 1, sizeof *input->seen_bytes);
    input->read_bytes = calloc(n ? n : 1, sizeof *input->read_bytes);
    input->saved_bytes = calloc(n ? n : 1, sizeof *input->saved_bytes);
    if (!input->files || !input->digests || !input->seen_bytes || !input->read_bytes ||
        !input->saved_bytes)
        return perta_fail_sys(err, ENOMEM, "%s", input->ck->path);
    for (uint32_t i = 0; i < n; i++) {
        const struct perta_shard *shard = &input->ck->shards[i];
        int rc = perta_shard_open(shard, direct, &input->files[i], err);
        if (rc)
            return rc;
        input->digests[i] = perta_digest_new(false);
        if (!input->digests[i])
            return perta_fail_sys(err, ENOMEM, "%s", shard->path);
        perta_digest_update(input->digests[i], shard->header->bytes, shard->header->len_bytes);
        input->seen_bytes[i] = input->read_bytes[i] = input->saved_bytes[i] =
            shard->header->len_bytes;
    }
    return 0;
}

void perta_input_digest_offload(struct perta_input *input, struct perta_hasher *hasher)
{
    for (uint32_t i = 0; i < input->ck->n_shards; i++)
        perta_digest_offload(input->digests[i], hasher);
}

void perta_input_close(struct perta_input *input)
{
    for (uint32_t i = 0; input->ck && i < input->ck->n_shards; i++) {
        if (input->files)
            perta_file_close(&input->files[i]);
        if (input->digests)
            perta_digest_free(input->digests[i]);
    }
    free(input->files);
    free(input->digests);
    free(input->seen_bytes);
    free(input->read_bytes);
    free(input->saved_bytes);
    perta_checkpoint_close(input->ck);
    *input = (struct perta_input){0};
}

void perta_input_range(struct perta_input *input, const struct perta_ref *ref, uint64_t first_unit,
                       uint64_t n_units, struct perta_range *range)
{
    uint64_t width = perta_dtype_unit_bytes(ref->tensor->dtype);
    *range = (struct perta_range){
        .file = &input->files[ref->shard],
        .off_bytes = ref->tensor->off_bytes + first_unit * width,
        .len_bytes = n_units * width,
    };
}

void perta_input_digest(struct perta_input *input, const struct perta_range *range)
{
    if (!range->file)
        return;
    size_t shard = (size_t)(range->file - input->files);
    input->read_bytes[shard] += range->len_bytes;
    if (range->off_bytes != input->seen_bytes[shard])
        return;
    perta_digest_update(input->digests[shard], range->data, range->len_bytes);
    input->seen_bytes[shard] += range->len_bytes;
}

void perta_input_digest_whole(struct perta_input *input)
{
    for (uint32_t i = 0; i < input->ck->n_shards; i++)
        input->read_bytes[i] = input->files[i].len_bytes;
}

static void add_bytes(void *digest, const uint8_t *data, uint64_t len_bytes)
{
    perta_digest_update(digest, data, len_bytes);
}

int perta_input_digest_rest(struct perta_input *input, struct perta_stream *stream,
                            struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < input->ck->n_shards && !rc; i++) {
        struct perta_file *file = &input->files[i];
        if (input->seen_bytes[i] == file->len_bytes || input->read_bytes[i] < file->len_bytes)
            continue;
        perta_digest_free(input->digests[i]);
        input->digests[i] = perta_digest_new(false);
        rc = input->digests[i]
                 ? perta_stream_read_file(stream, file, add_bytes, input->digests[i], err)
                 : perta_fail_sys(err, ENOMEM, "%s", file->path);
        input->seen_bytes[i] = file->len_bytes;
    }
    return rc;
}

int perta_input_unchanged(const struct perta_input *input, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < input->ck->n_shards && !rc; i++)
        rc = perta_file_unchanged(&input->files[i], err);
    return rc;
}

json_t *perta_input_json(struct perta_input *input)
{
    json_t *shards = json_array();
    for (uint32_t i = 0; i < input->ck->n_shards; i++) {
        const struct perta_shard *shard = &input->ck->shards[i];
        struct perta_digest_hex hex;
        perta_digest_finish(input->digests[i], &hex);
        bool whole = input->seen_bytes[i] == shard->size_bytes;
        perta_json_append(&shards, json_pack("{s:s, s:I, s:s?}", "name", shard->name, "bytes",
                                             (json_int_t)shard->size_bytes, "xxh3_128",
                                             whole ? hex.xxh128 : NULL));
    }
    return json_pack("{s:o}", "shards", shards);
}

int perta_paths_add(const char ***paths, size_t *n_paths, const char *path, struct perta_err *err)
{
    const char **grown = realloc(*paths, (*n_paths + 1) * sizeof *grown);
    if (!grown)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    *paths = grown;
    grown[(*n_paths)++] = path;
    return 0;
}

int perta_input_paths(const struct perta_input *input, const char ***paths, size_t *n_paths,
                      struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < input->ck->n_shards && !rc; i++)
        rc = perta_paths_add(paths, n_paths, input->ck->shards[i].path, err);
    return rc;
}
