#include "estimators/passes/importance.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "estimators/edit/recipe.h"
#include "io/text.h"

/* ---- the plan ---- */

static int plan_shard(struct perta_importance_shard *to, const struct perta_shard *from,
                      enum perta_dtype dtype, const json_t *metadata,
                      bool (*wanted)(void *ctx, const char *name), void *ctx, struct perta_err *err)
{
    to->tensors = calloc(from->header->n_tensors + 1, sizeof *to->tensors);
    if (!to->tensors)
        return perta_fail_sys(err, ENOMEM, "headers");
    for (uint64_t i = 0; i < from->header->n_tensors; i++) {
        const struct perta_tensor *tensor = &from->header->tensors[i];
        if (wanted && !wanted(ctx, tensor->name))
            continue;
        to->tensors[to->n_tensors] = *tensor;
        to->tensors[to->n_tensors++].dtype = dtype;
    }
    if (!to->n_tensors && from->header->n_tensors)
        return 0;
    int rc = perta_safetensors_build(to->tensors, to->n_tensors, metadata, &to->header,
                                     &to->header_bytes, err);
    to->file_bytes = to->header_bytes;
    for (uint64_t i = 0; i < to->n_tensors; i++)
        to->file_bytes += to->tensors[i].len_bytes;
    return rc;
}

/* transformers looks for an index if there are several shards. */
static int write_index(struct perta_importance *plan, struct perta_err *err)
{
    json_t *map = json_object();
    uint64_t total = 0;
    for (uint32_t s = 0; s < plan->n_shards; s++)
        for (uint64_t i = 0; i < plan->shards[s].n_tensors; i++) {
            const struct perta_tensor *tensor = &plan->shards[s].tensors[i];
            perta_json_set(&map, tensor->name, json_string(plan->shards[s].name));
            total += tensor->len_bytes;
        }
    json_t *index =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    plan->index = index ? perta_json_text(index, JSON_INDENT(1) | JSON_SORT_KEYS) : NULL;
    json_decref(index);
    return plan->index ? 0 : perta_fail_sys(err, ENOMEM, PERTA_INDEX_NAME);
}

static json_t *metadata_of(const struct perta_importance_about *about)
{
    json_t *metadata =
        json_pack("{s:s, s:s, s:o}", "format", "pt", "perta.stat", perta_stat_name(about->stat),
                  "perta.samples", json_sprintf("%llu", (unsigned long long)about->n_samples));
    if (about->n_tokens)
        perta_json_set(&metadata, "perta.tokens",
                       json_sprintf("%llu", (unsigned long long)about->n_tokens));
    if (about->data_hmac && *about->data_hmac)
        perta_json_set(&metadata, "perta.data_hmac_sha256", json_string(about->data_hmac));
    if (about->quantize)
        perta_json_set(&metadata, "perta.quantize",
                       json_string(perta_rounding_name(about->quantize)));
    if (about->adapter) {
        char *text = perta_json_text(about->adapter, JSON_COMPACT | JSON_SORT_KEYS);
        perta_json_set(&metadata, "perta.adapter", text ? json_string(text) : NULL);
        free(text);
    }
    return metadata;
}

int perta_importance_plan_as(struct perta_importance *plan, const struct perta_checkpoint *like,
                             enum perta_dtype dtype, json_t *metadata,
                             bool (*wanted)(void *ctx, const char *name), void *ctx,
                             struct perta_err *err)
{
    *plan = (struct perta_importance){0};
    plan->shards = calloc(like->n_shards + 1, sizeof *plan->shards);
    int rc = plan->shards && metadata ? 0 : perta_fail_sys(err, ENOMEM, "headers");
    for (uint32_t s = 0; s < like->n_shards && !rc; s++) {
        struct perta_importance_shard *shard = &plan->shards[plan->n_shards];
        shard->name = like->shards[s].name;
        rc = plan_shard(shard, &like->shards[s], dtype, metadata, wanted, ctx, err);
        if (shard->header) {
            plan->n_shards++;
        } else {
            free(shard->tensors);
            *shard = (struct perta_importance_shard){0};
        }
    }
    json_decref(metadata);
    if (!rc && plan->n_shards == 1)
        plan->shards[0].name = "model.safetensors";
    return rc || plan->n_shards < 2 ? rc : write_index(plan, err);
}

int perta_importance_plan(struct perta_importance *plan, const struct perta_checkpoint *like,
                          const struct perta_importance_about *about,
                          bool (*wanted)(void *ctx, const char *name), void *ctx,
                          struct perta_err *err)
{
    return perta_importance_plan_as(plan, like, PERTA_F32, metadata_of(about), wanted, ctx, err);
}

void perta_importance_release(struct perta_importance *plan)
{
    for (uint32_t s = 0; s < plan->n_shards; s++) {
        free(plan->shards[s].header);
        free(plan->shards[s].tensors);
    }
    free(plan->shards);
    free(plan->index);
    *plan = (struct perta_importance){0};
}

/* ---- writing, in any order ---- */

static int by_name(const void *a, const void *b)
{
    const struct by_name *x = a, *y = b;
    return strcmp(x->tensor->name, y->tensor->name);
}

static int make_file(struct perta_importance_out *out, uint32_t s, struct perta_err *err)
{
    const struct perta_importance_shard *shard = &out->plan.shards[s];
    char *path = perta_publish_path(&out->folder, shard->name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", shard->name);
    out->fds[s] = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    int rc = out->fds[s] < 0 ? perta_fail_sys(err, errno, "%s", path) : 0;
    if (!rc && fallocate(out->fds[s], 0, 0, (off_t)shard->file_bytes)) {
        if (errno == ENOSPC)
            rc = perta_fail_sys(err, errno, "%s: needs %llu bytes", path,
                                (unsigned long long)shard->file_bytes);
        else if (ftruncate(out->fds[s], (off_t)shard->file_bytes))
            rc = perta_fail_sys(err, errno, "%s", path);
    }
    if (!rc)
        rc = perta_write_all(out->fds[s], shard->header, shard->header_bytes, path, err);
    free(path);
    return rc;
}

static int open_file(struct perta_importance_out *out, uint32_t s, struct perta_err *err)
{
    struct stat st;
    char *path = perta_publish_path(&out->folder, out->plan.shards[s].name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", out->plan.shards[s].name);
    out->fds[s] = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    int rc = 0;
    if (out->fds[s] < 0)
        rc = perta_fail_sys(err, errno, "%s", path);
    else if ((rc = perta_check_left(out->fds[s], path, &st, err)))
        ;
    else if ((uint64_t)st.st_size != out->plan.shards[s].file_bytes)
        rc = perta_fail(err, PERTA_EINPUT, "%s: %lld bytes, not %llu; --force starts over", path,
                        (long long)st.st_size, (unsigned long long)out->plan.shards[s].file_bytes);
    free(path);
    return rc;
}

/* Open the file a second time with O_DIRECT, if the file system allows it. */
static int open_direct(struct perta_importance_out *out, uint32_t s, struct perta_err *err)
{
    char *path = perta_publish_path(&out->folder, out->plan.shards[s].name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", out->plan.shards[s].name);
    out->direct_fds[s] = open(path, O_WRONLY | O_DIRECT | O_CLOEXEC | O_NOFOLLOW);
    free(path);
    return 0;
}

/* Take over plan, and sort its tensors by name. */
static int take_over(struct perta_importance_out *out, struct perta_importance *plan,
                     struct perta_err *err)
{
    *out = (struct perta_importance_out){.plan = *plan};
    *plan = (struct perta_importance){0};
    uint64_t n_tensors = 0;
    for (uint32_t s = 0; s < out->plan.n_shards; s++)
        n_tensors += out->plan.shards[s].n_tensors;
    out->fds = calloc(out->plan.n_shards + 1, sizeof *out->fds);
    out->direct_fds = calloc(out->plan.n_shards + 1, sizeof *out->direct_fds);
    out->by_name = calloc(n_tensors + 1, sizeof *out->by_name);
    if (!out->fds || !out->direct_fds || !out->by_name)
        return perta_fail_sys(err, ENOMEM, "importance");
    for (uint32_t s = 0; s < out->plan.n_shards; s++) {
        out->fds[s] = out->direct_fds[s] = -1;
        for (uint64_t i = 0; i < out->plan.shards[s].n_tensors; i++)
            out->by_name[out->n_tensors++] = (struct by_name){&out->plan.shards[s].tensors[i], s};
    }
    qsort(out->by_name, out->n_tensors, sizeof *out->by_name, by_name);
    return 0;
}

int perta_importance_begin(struct perta_importance_out *out, struct perta_importance *plan,
                           const char *path, const struct perta_journal *journal, bool force,
                           struct perta_behind *behind, struct perta_err *err)
{
    int rc = take_over(out, plan, err);
    out->behind = behind;
    if (!rc)
        rc = perta_journal_folder(journal, &out->folder, path, NULL, force, err);
    if (!out->folder.made) /* already published by an interrupted run */
        return rc;
    for (uint32_t s = 0; s < out->plan.n_shards && !rc; s++)
        rc = journal->resuming ? open_file(out, s, err) : make_file(out, s, err);
    for (uint32_t s = 0; s < out->plan.n_shards && !rc; s++)
        rc = open_direct(out, s, err);
    return rc;
}

int perta_importance_write(struct perta_importance_out *out, const char *name, uint64_t first,
                           const void *data, uint64_t n, struct perta_err *err)
{
    const struct perta_tensor wanted = {.name = (char *)name};
    const struct by_name key = {&wanted, 0};
    const struct by_name *found =
        bsearch(&key, out->by_name, out->n_tensors, sizeof *out->by_name, by_name);
    if (!found)
        return perta_fail(err, PERTA_EINPUT, "tensor %s is not in the checkpoint", name);
    uint64_t width = perta_dtype_unit_bytes(found->tensor->dtype);
    out->written_bytes += n * width;
    return perta_behind_write(out->behind, out->fds[found->shard], out->direct_fds[found->shard],
                              data, n * width, found->tensor->off_bytes + first * width,
                              found->tensor->name, err);
}

int perta_importance_sync(const struct perta_importance_out *out, struct perta_err *err)
{
    int rc = perta_behind_settle(out->behind, err);
    for (uint32_t s = 0; s < out->plan.n_shards && !rc; s++)
        if (out->fds[s] >= 0 && fsync(out->fds[s]))
            rc = perta_fail_sys(err, errno, "%s: fsync", out->plan.shards[s].name);
    return rc;
}

int perta_importance_finish(struct perta_importance_out *out, struct perta_err *err)
{
    int rc = perta_importance_sync(out, err);
    return rc || !out->plan.index || !out->folder.made
               ? rc
               : perta_publish_file(&out->folder, PERTA_INDEX_NAME, out->plan.index,
                                    strlen(out->plan.index), err);
}

void perta_importance_out_release(struct perta_importance_out *out)
{
    for (uint32_t s = 0; out->fds && s < out->plan.n_shards; s++)
        if (out->fds[s] >= 0)
            close(out->fds[s]);
    for (uint32_t s = 0; out->direct_fds && s < out->plan.n_shards; s++)
        if (out->direct_fds[s] >= 0)
            close(out->direct_fds[s]);
    free(out->fds);
    free(out->direct_fds);
    free(out->by_name);
    perta_publish_release(&out->folder);
    perta_importance_release(&out->plan);
    *out = (struct perta_importance_out){0};
}
