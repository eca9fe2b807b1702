#include "io/format/tied.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/file.h"
#include "io/format/naming.h"

#define READ_BYTES (512ull << 10)

static int differ(const struct perta_checkpoint *ck, const struct perta_tensor *a,
                  const struct perta_tensor *b, struct perta_err *err)
{
    bool is_said = json_is_true(json_object_get(ck->config, "tie_word_embeddings"));
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensors %s and %s differ, though \"tie_word_embeddings\" in its "
                      "config.json says that they are one%s; set it to false if both are meant, or "
                      "remove the one that is not",
                      ck->path, a->name, b->name,
                      is_said ? "" : " (it is left out, and true by default for this model_type)");
}

static bool look_the_same(const struct perta_tensor *a, const struct perta_tensor *b)
{
    bool same = a->dtype == b->dtype && a->n_dims == b->n_dims && a->len_bytes == b->len_bytes;
    for (uint32_t i = 0; same && i < a->n_dims; i++)
        same = a->shape[i] == b->shape[i];
    return same;
}

/* room: 2 * READ_BYTES. */
static int compare(const struct perta_file *files, const struct perta_tensor *const *of,
                   uint8_t *room, bool *same, struct perta_err *err)
{
    for (uint64_t at = 0, n; at < of[0]->len_bytes && *same; at += n) {
        n = of[0]->len_bytes - at < READ_BYTES ? of[0]->len_bytes - at : READ_BYTES;
        for (int i = 0; i < 2; i++) {
            int rc = perta_pread_all(files[i].fd, i ? room + READ_BYTES : room, n,
                                     of[i]->off_bytes + at, files[i].path, err);
            if (rc)
                return rc;
        }
        *same = !memcmp(room, room + READ_BYTES, n);
    }
    return 0;
}

int perta_tied_compare(const struct perta_checkpoint *ck, const struct perta_ref *a,
                       const struct perta_checkpoint *other, const struct perta_ref *b, bool *same,
                       struct perta_err *err)
{
    const struct perta_shard *const shards[2] = {&ck->shards[a->shard], &other->shards[b->shard]};
    const struct perta_tensor *of[2] = {a->tensor, b->tensor};
    if (!(*same = look_the_same(of[0], of[1])))
        return 0;
    struct perta_file files[2] = {{.fd = -1}, {.fd = -1}};
    uint8_t *room = malloc(2 * READ_BYTES);
    int rc = room ? 0 : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    for (int i = 0; i < 2 && !rc; i++)
        rc = perta_shard_open(shards[i], false, &files[i], err);
    if (!rc)
        rc = compare(files, of, room, same, err);
    for (int i = 0; i < 2; i++)
        perta_file_close(&files[i]);
    free(room);
    return rc;
}

int perta_tied_check(const struct perta_checkpoint *ck, struct perta_err *err)
{
    const struct perta_ref *a, *b;
    bool same = true;
    if (!perta_is_tied(ck) || !perta_tied_pair(ck, &a, &b))
        return 0;
    int rc = perta_tied_compare(ck, a, ck, b, &same, err);
    return rc || same ? rc : differ(ck, a->tensor, b->tensor, err);
}
