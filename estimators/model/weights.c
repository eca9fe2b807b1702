#include "estimators/model/weights.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/model/wrapper.h"
#include "io/format/naming.h"
#include "io/format/tied.h"
#include "io/format/which.h"

struct checked {
    const struct perta_weights *weights;
    bool *wanted; /* (n_tensors), in the order of by_name: the architecture has it */
};

static bool has_shape(const struct perta_tensor *t, const struct perta_tensor_shape *shape)
{
    bool same = t->n_dims == shape->n_dims;
    assert(shape->n_dims <= 3);
    for (size_t i = 0; i < shape->n_dims && same; i++)
        same = t->shape[i] == shape->dims[i];
    return same;
}

static int wrong_shape(const struct perta_weights *w, const struct perta_tensor *t,
                       const struct perta_tensor_shape *wanted, struct perta_err *err)
{
    char shape[128], dims[96] = "";
    size_t n = 0;
    perta_shape_print(shape, sizeof shape, t);
    for (size_t i = 0; i < wanted->n_dims; i++)
        n += (size_t)snprintf(dims + n, sizeof dims - n, "%s%zu", i ? ", " : "", wanted->dims[i]);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensor %s has not the shape [%s] that config.json calls for, but %s",
                      w->ck->path, t->name, dims, shape);
}

static int check_tensor(void *ctx, const char *name, const struct perta_tensor_shape *shape,
                        struct perta_err *err)
{
    struct checked *checked = ctx;
    const struct perta_weights *w = checked->weights;
    if (!strcmp(name, w->llm.names.embedding))
        name = perta_weights_embedding(w);
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    if (!ref)
        return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s, which its config.json calls for",
                          w->ck->path, name);
    const struct perta_tensor *t = ref->tensor;
    if (!has_shape(t, shape))
        return wrong_shape(w, t, shape, err);
    if (t->dtype != PERTA_F32 && t->dtype != PERTA_BF16 && t->dtype != PERTA_F16)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16 or F32 needed",
                          w->ck->path, name, perta_dtype_name(t->dtype));
    checked->wanted[ref - w->ck->by_name] = true;
    return 0;
}

/* Is it of what predicts further tokens: of a layer after the last one that takes part in the loss, or
 * named so? */
static bool is_extra(const struct perta_llm *llm, const char *name)
{
    const struct perta_family *family = llm->family;
    size_t of_base = strlen(family->base);
    if (family->extra && !strncmp(name, family->base, of_base) && name[of_base] == '.' &&
        !strncmp(name + of_base + 1, family->extra, strlen(family->extra)))
        return true;
    size_t n = strlen(llm->names.layers);
    char *end;
    if (strncmp(name, llm->names.layers, n) || name[n] != '.' || !isdigit(name[n + 1]))
        return false;
    unsigned long long layer = strtoull(name + n + 1, &end, 10);
    return *end == '.' && layer >= llm->n_layers && layer - llm->n_layers < llm->n_extra_layers;
}

bool perta_weights_is_parameter(const struct perta_weights *w, const char *name)
{
    if (!strcmp(name, w->llm.names.head))
        return !strcmp(name, perta_weights_head(w));
    const struct perta_ref *ref = perta_checkpoint_find(w->ck, name);
    bool buffer = ref ? perta_is_buffer(ref->tensor) : perta_is_buffer_name(name);
    return !buffer && !is_extra(&w->llm, name) && !(w->llm.wrapper && perta_wrapper_is_other(name));
}

/* Refuse tensors that are never read: they have no gradient, and zeros for them would mislead. */
static int check_strangers(const struct checked *checked, struct perta_err *err)
{
    const struct perta_weights *w = checked->weights;
    for (uint64_t i = 0; i < w->ck->n_tensors; i++) {
        const char *name = w->ck->by_name[i].tensor->name;
        if (!checked->wanted[i] && perta_weights_is_parameter(w, name))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: has tensor %s, which its config.json does not call for; is it "
                              "another architecture?",
                              w->ck->path, name);
    }
    return 0;
}

/* Embedding and head are compared as they are stored, which tells nothing of codes. */
static int refuse_codes(const struct perta_weights *w, const struct perta_ref *embedding,
                        const struct perta_ref *head, struct perta_err *err)
{
    const struct perta_dequantise *how = w->dequantised.how;
    bool are_codes =
        how && (perta_dequantise_find(how, w->ck, embedding)->coding != PERTA_CODING_NONE ||
                perta_dequantise_find(how, w->ck, head)->coding != PERTA_CODING_NONE);
    return are_codes ? perta_fail(err, PERTA_EINPUT,
                                  "%s: tensors %s and %s are tied, and quantised twice; perta "
                                  "dequantize writes a model that says whether they are the same",
                                  w->ck->path, embedding->tensor->name, head->tensor->name)
                     : 0;
}

/* A model around a language model stores a head of its own, or it is the embedding. */
static int settle_tie(struct perta_weights *w, struct perta_err *err)
{
    const struct perta_ref *embedding, *head;
    bool same = false, by_config = w->llm.tied;
    if (!w->llm.wrapper)
        return 0;
    w->llm.tied = perta_is_tied(w->ck);
    int rc = 0;
    if (by_config && !w->llm.tied && perta_tied_pair(w->ck, &embedding, &head)) {
        rc = refuse_codes(w, embedding, head, err);
        if (!rc)
            rc = perta_tied_compare(w->ck, embedding, w->ck, head, &same, err);
    }
    if (rc || !same)
        return rc;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensors %s and %s are the same; say under \"tie_word_embeddings\" in "
                      "its config.json whether they are one",
                      w->ck->path, embedding->tensor->name, head->tensor->name);
}

/* Experts are in tensors of their own, or all in one. */
static void choose_experts(struct perta_weights *w)
{
    struct perta_llm *llm = &w->llm;
    const uint32_t apart = llm->options;
    char name[PERTA_NAME_BYTES];
    llm->options = (apart & ~(uint32_t)PERTA_EXPERTS_APART) | PERTA_EXPERTS_TOGETHER;
    for (uint32_t l = 0; l < llm->n_layers; l++)
        for (int p = PERTA_EXPERT_GATE; p <= PERTA_EXPERT_DOWN_BIAS; p++) {
            const struct perta_param_row *row = perta_llm_param(llm, l, (enum perta_param)p);
            if (row && perta_checkpoint_find(
                           w->ck, perta_llm_name(llm, perta_site_of_expert(l, 0), row, name)))
                return;
        }
    llm->options = apart;
}

static int check_tied(const struct perta_weights *w, struct perta_err *err)
{
    const struct perta_ref *embedding, *head;
    int rc = perta_is_tied(w->ck) && perta_tied_pair(w->ck, &embedding, &head)
                 ? refuse_codes(w, embedding, head, err)
                 : 0;
    return rc ? rc : perta_tied_check(w->ck, err);
}

static bool has_layers(const struct perta_weights *w)
{
    size_t n = strlen(w->llm.names.layers);
    for (uint64_t i = 0; i < w->ck->n_tensors; i++) {
        const char *name = w->ck->by_name[i].tensor->name;
        if (!strncmp(name, w->llm.names.layers, n) && name[n] == '.')
            return true;
    }
    return false;
}

/* Some files have been saved from the model without its head, and their names have another base. */
static void choose_base(struct perta_weights *w)
{
    const struct perta_family *family = w->llm.family;
    if (!family->other_base || has_layers(w))
        return;
    perta_llm_set_names(&w->llm, family->other_base, "");
    if (!has_layers(w))
        perta_llm_set_names(&w->llm, family->base, "");
}

int perta_weights_open(struct perta_weights *w, const char *path, struct perta_err *err)
{
    *w = (struct perta_weights){.parameters.get = perta_weights_get,
                                .lock = PTHREAD_MUTEX_INITIALIZER,
                                .filled = PTHREAD_COND_INITIALIZER};
    int rc = perta_checkpoint_open(path, &w->ck, err);
    if (!rc)
        rc = perta_which_model(w->ck, err);
    if (rc)
        return rc;
    if (!w->ck->config)
        return w->ck->config_flaw
                   ? perta_fail(err, PERTA_EINPUT, "%s", w->ck->config_flaw)
                   : perta_fail(err, PERTA_EINPUT,
                                "%s: no config.json, which says what architecture it is", path);
    rc = perta_dequantised_open(&w->dequantised, w->ck, err);
    if (rc)
        return rc;
    if (w->dequantised.how)
        w->source = &w->dequantised.source;
    rc = perta_llm_parse(w->ck->config, w->ck->config_path, &w->llm, err);
    if (!rc && w->llm.wrapper)
        perta_wrapper_names(&w->llm, w->ck);
    if (!rc)
        choose_base(w);
    if (!rc)
        choose_experts(w);
    if (!rc)
        rc = settle_tie(w, err);
    struct checked checked = {w, calloc(w->ck->n_tensors + 1, sizeof *checked.wanted)};
    if (!rc && !checked.wanted)
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        rc = perta_llm_each(&w->llm, check_tensor, &checked, err);
    if (!rc)
        rc = check_strangers(&checked, err);
    if (!rc)
        rc = check_tied(w, err);
    free(checked.wanted);
    return rc;
}

uint64_t perta_weights_stored(const struct perta_weights *w, const struct perta_ref *ref)
{
    return perta_dequantised_stored(&w->dequantised, ref);
}

/* safetensors' save_model may store a tied pair under the head's name; transformers accepts
 * both. */
const char *perta_weights_embedding(const struct perta_weights *w)
{
    const struct perta_llm_names *names = &w->llm.names;
    bool as_head = w->llm.tied && !perta_checkpoint_find(w->ck, names->embedding) &&
                   perta_checkpoint_find(w->ck, names->head);
    return as_head ? names->head : names->embedding;
}

const char *perta_weights_head(const struct perta_weights *w)
{
    return w->llm.tied ? perta_weights_embedding(w) : w->llm.names.head;
}

/* ---- rounding ---- */

/* The parameter of a layer with this role, if it is a matrix (*out, *in) that is rounded; else
 * NULL. */
static const struct perta_param_row *matrix_of(const struct perta_weights *w, uint32_t layer,
                                               int param, size_t *out, size_t *in)
{
    const struct perta_param_row *row = perta_llm_param(&w->llm, layer, (enum perta_param)param);
    if (!row || !perta_weights_rounds(w, row))
        return NULL;
    perta_llm_shape(&w->llm, row, out, in);
    return row;
}

int perta_weights_round(struct perta_weights *w, enum perta_rounding rounding,
                        struct perta_err *err)
{
    char name[PERTA_NAME_BYTES];
    w->rounding = rounding;
    for (uint32_t l = 0; rounding && l < w->llm.n_layers; l++)
        for (int p = 0; p < PERTA_N_PARAMS; p++) {
            size_t out, in;
            const struct perta_param_row *row = matrix_of(w, l, p, &out, &in);
            if (row && row->transposed)
                return perta_fail(err, PERTA_EINPUT,
                                  "%s: tensor %s is stored transposed; rounding such tensors is "
                                  "not supported",
                                  w->ck->path,
                                  perta_llm_name(&w->llm, perta_site_of_expert(l, 0), row, name));
            if (row && !perta_rounding_fits(rounding, in))
                return perta_fail(
                    err, PERTA_EINPUT,
                    "%s: tensor %s: its rows of %zu elements are not whole blocks of %s "
                    "(%zu elements); such a tensor is stored in another format",
                    w->ck->path, perta_llm_name(&w->llm, perta_site_of_expert(l, 0), row, name), in,
                    perta_rounding_name(rounding), perta_rounding_block(rounding, in));
        }
    return 0;
}

uint64_t perta_weights_n_rounded(const struct perta_weights *w)
{
    uint64_t n = 0;
    size_t out, in;
    for (uint32_t l = 0; w->rounding && l < w->llm.n_layers; l++)
        for (int p = 0; p < PERTA_N_PARAMS; p++)
            if (matrix_of(w, l, p, &out, &in))
                n += (uint64_t)out * in *
                     (perta_is_of_expert((enum perta_param)p) ? w->llm.n_experts : 1);
    return n;
}

/* ---- the reader ---- */

void perta_weights_settle(struct perta_weights *w)
{
    struct perta_err none = {0};
    perta_reader_wait(w->reader, &none);
}

int perta_weights_on_reader(struct perta_weights *w, int (*job)(void *ctx, struct perta_err *err),
                            void *ctx, struct perta_err *err)
{
    perta_weights_settle(w);
    perta_reader_begin(w->reader, job, ctx);
    return perta_reader_wait(w->reader, err);
}

static int open_engine(void *of, struct perta_err *err)
{
    struct perta_weights *w = of;
    int rc = perta_engine_open(w->choice.mode, PERTA_WEIGHTS_PIECES, &w->engine, err);
    for (uint32_t i = 0; i < w->ck->n_shards && !rc; i++)
        rc = perta_shard_open(&w->ck->shards[i], w->engine->wants_direct, &w->files[i], err);
    return rc || !w->source ? rc : w->source->ops->open(w->source, w->engine->wants_direct, err);
}

static int close_engine(void *of, struct perta_err *err)
{
    (void)err;
    struct perta_weights *w = of;
    perta_engine_close(w->engine);
    w->engine = NULL;
    return 0;
}

int perta_weights_start(struct perta_weights *w, enum perta_io_mode io, struct perta_err *err)
{
    const char **paths = calloc(w->ck->n_shards + 1, sizeof *paths);
    size_t n_paths = 0;
    w->files = calloc(w->ck->n_shards + 1, sizeof *w->files);
    if (!paths || !w->files) {
        free(paths);
        return perta_fail_sys(err, ENOMEM, "%s", w->ck->path);
    }
    for (; n_paths < w->ck->n_shards; n_paths++)
        paths[n_paths] = w->ck->shards[n_paths].path;
    int rc = w->source ? w->source->ops->paths(w->source, &paths, &n_paths, err) : 0;
    if (!rc)
        rc = perta_engine_choose(io, paths, n_paths, &w->choice, err);
    free(paths);
    if (!rc)
        rc = perta_reader_open(&w->reader, err);
    return rc ? rc : perta_weights_on_reader(w, open_engine, w, err);
}

int perta_weights_unchanged(const struct perta_weights *w, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < w->ck->n_shards && !rc; i++)
        rc = perta_file_unchanged(&w->files[i], err);
    return rc || !w->source ? rc : w->source->ops->unchanged(w->source, err);
}

void perta_weights_stop(struct perta_weights *w)
{
    struct perta_err never = {0};
    if (!w->reader)
        return;
    pthread_mutex_lock(&w->lock);
    w->n_queued = 0; /* after an error or a signal, nobody waits for these */
    pthread_mutex_unlock(&w->lock);
    perta_weights_on_reader(w, close_engine, w, &never);
    perta_reader_close(w->reader);
    w->reader = NULL;
    memset(w->ahead, 0, sizeof w->ahead);
}

void perta_weights_close(struct perta_weights *w)
{
    perta_weights_stop(w);
    for (int i = 0; i < PERTA_WEIGHTS_ROOMS; i++)
        if (w->be)
            w->be->ops->free(w->be, w->buffers[i]);
    for (uint32_t i = 0; w->files && i < w->ck->n_shards; i++)
        perta_file_close(&w->files[i]);
    free(w->files);
    perta_dequantised_close(&w->dequantised);
    perta_checkpoint_close(w->ck);
    *w = (struct perta_weights){0};
}
