#include "estimators/passes/adapted.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/kernels.h"
#include "estimators/model/wrapper.h"
#include "io/file.h"
#include "io/text.h"
#include "stream/journal.h"

/* ---- open ---- */

/* Where in adapter->changes a layer's weight has its change; NULL: nowhere. */
static const struct perta_change *change_of(const struct perta_adapted *adapted,
                                            const struct perta_llm *llm, struct perta_site site,
                                            const struct perta_param_row *row)
{
    char name[PERTA_NAME_BYTES];
    perta_llm_name(llm, site, row, name);
    return perta_adapter_find(adapted->adapter, name);
}

/* part: the tensor of the adapter that is not supported. */
static int refuse(const struct perta_adapted *adapted, const struct perta_ref *part,
                  const char *why, struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensor %s: %s, but --adapter takes LoRA of the layers' linear modules; "
                      "merge the adapter into its base (merge_and_unload, save_pretrained) and "
                      "give that as --model",
                      adapted->ck->shards[0].path, part->tensor->name, why);
}

/* Add the LoRA of a weight of this site, if the adapter has one. */
static int add_factor(const struct perta_adapted *adapted, const struct perta_llm *llm,
                      struct perta_site site, const struct perta_param_row *row,
                      struct perta_factors *factors, bool *used, struct perta_err *err)
{
    const struct perta_change *c = change_of(adapted, llm, site, row);
    if (!c)
        return 0;
    used[c - adapted->adapter->changes] = true;
    if (c->whole)
        return refuse(adapted, c->whole, "a whole tensor", err);
    if (c->base_layer)
        return refuse(adapted, c->base_layer, "a base of its own", err);
    perta_factors_add(factors, site, row, c->r, c->scaling);
    return 0;
}

static int add_factors(const struct perta_adapted *adapted, const struct perta_llm *llm,
                       struct perta_factors *factors, bool *used, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t l = 0; l < llm->n_layers && !rc; l++)
        for (int p = 0; p < PERTA_N_PARAMS && !rc; p++) {
            const struct perta_param_row *row = perta_llm_param(llm, l, (enum perta_param)p);
            bool of_expert = perta_is_of_expert((enum perta_param)p);
            for (uint32_t e = 0; row && e < (of_expert ? llm->n_experts : 1) && !rc; e++)
                rc = add_factor(adapted, llm,
                                of_expert ? perta_site_of_expert(l, e) : perta_site_of(l), row,
                                factors, used, err);
        }
    return rc;
}

static int match(const struct perta_adapted *adapted, const struct perta_llm *llm,
                 struct perta_factors *factors, struct perta_err *err)
{
    const struct perta_adapter *a = adapted->adapter;
    bool *used = calloc(a->n_changes, sizeof *used);
    int rc = used ? perta_factors_open(factors, llm, err) : perta_fail_sys(err, ENOMEM, "adapter");
    if (!rc)
        rc = add_factors(adapted, llm, factors, used, err);
    for (uint64_t i = 0; i < a->n_changes && !rc; i++) {
        const struct perta_change *c = &a->changes[i];
        /* of another part than the language model: it changes nothing for text */
        bool is_other = llm->wrapper && perta_wrapper_is_other(c->target);
        if (!used[i] && !is_other)
            rc = c->whole ? refuse(adapted, c->whole, "a whole tensor", err)
                          : refuse(adapted, c->a, "a LoRA outside the layers", err);
    }
    free(used);
    return rc;
}

int perta_adapted_open(struct perta_adapted *adapted, const char *path,
                       const struct perta_weights *weights, struct perta_factors *factors,
                       json_t *notes, struct perta_err *err)
{
    if (!perta_checkpoint_is_adapter(path))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: not the folder of a PEFT adapter (" PERTA_ADAPTER_CONFIG
                          ", adapter_model.safetensors)",
                          path);
    int rc = perta_checkpoint_open_adapter(path, &adapted->ck, err);
    if (!rc)
        rc = perta_adapter_open(adapted->ck, weights->ck, &adapted->adapter, notes, err);
    return rc ? rc : match(adapted, &weights->llm, factors, err);
}

void perta_adapted_note_patch(const struct perta_adapted *adapted, const char *patch,
                              json_t **notes)
{
    if (!adapted->ck)
        return;
    const struct perta_shard *shard = &adapted->ck->shards[0];
    const char *text = json_string_value(json_object_get(shard->header->metadata, "perta.tune"));
    json_t *recipe = text ? json_loads(text, 0, NULL) : NULL;
    const char *trained = json_string_value(json_object_get(recipe, "patch"));
    if (trained && (!patch || strcmp(trained, patch)))
        perta_json_append(
            notes, perta_text_json("%s: trained on the model that a patch leads to, which is not "
                                   "given here (SHA-256 of its manifest.json: %s)",
                                   shard->path, trained));
    json_decref(recipe);
}

void perta_adapted_close(struct perta_adapted *adapted)
{
    perta_adapter_close(adapted->adapter);
    perta_checkpoint_close(adapted->ck);
    *adapted = (struct perta_adapted){0};
}

json_t *perta_adapted_json(const struct perta_adapted *adapted)
{
    return json_pack("{s:o, s:o}", "files", perta_journal_checkpoint(adapted->ck), "config",
                     perta_journal_config(adapted->ck));
}

/* ---- load ---- */

#define PIECE_FLOATS 8192

/* Read n elements of a factor: first, first + stride, ..., as float32 to their place in the backend's
 * memory. */
static int load_floats(const struct perta_file *file, const struct perta_tensor *t, uint64_t first,
                       uint64_t stride, uint64_t n, struct perta_backend *be, struct perta_array to,
                       struct perta_err *err)
{
    uint64_t width = perta_dtype_unit_bytes(t->dtype), most = (PIECE_FLOATS - 1) / stride + 1;
    uint8_t bytes[PIECE_FLOATS * sizeof(float)];
    float floats[PIECE_FLOATS];
    int rc = 0;
    for (uint64_t at = 0, some; at < n && !rc; at += some) {
        some = n - at < most ? n - at : most;
        uint64_t from = first + at * stride, span = (some - 1) * stride + 1;
        rc = perta_pread_all(file->fd, bytes, span * width, t->off_bytes + from * width, file->path,
                             err);
        if (rc)
            break;
        perta_row_kernels()->to_f32(floats, bytes, t->dtype, span);
        for (uint64_t i = 0; i < some && !rc; i++) {
            floats[i] = floats[i * stride];
            if (!isfinite(floats[i]))
                rc = perta_fail(err, PERTA_EINPUT,
                                "%s: tensor %s, element %llu: not a finite number", file->path,
                                t->name, (unsigned long long)(from + i * stride));
        }
        be->ops->put(be, perta_array_at(to, at), floats, some * sizeof *floats);
    }
    return rc;
}

/* Read A and B of a factor, which may be one expert's among those of all (adapter.h). */
static int load_factor(const struct perta_file *file, const struct perta_change *c,
                       const struct perta_factor *f, struct perta_backend *be,
                       struct perta_low_rank to, struct perta_err *err)
{
    uint64_t E = c->n_experts, expert = c->expert;
    if (c->n_matrices > 1)
        expert += f->site.expert - 1;
    int rc = load_floats(file, c->a->tensor, expert * f->r * f->in, 1, f->r * f->in, be, to.a, err);
    if (!rc && E == 1)
        rc = load_floats(file, c->b->tensor, c->b_first * f->r, 1, f->out * f->r, be, to.b, err);
    for (uint64_t row = 0; E > 1 && row < f->out && !rc; row++)
        rc = load_floats(file, c->b->tensor, (c->b_first + row) * f->r * E + expert, E, f->r, be,
                         perta_array_at(to.b, row * f->r), err);
    return rc;
}

int perta_adapted_load(const struct perta_adapted *adapted, const struct perta_factors *factors,
                       struct perta_backend *be, struct perta_err *err)
{
    struct perta_file file = {0};
    int rc = perta_shard_open(&adapted->ck->shards[0], false, &file, err);
    for (size_t i = 0; i < factors->n && !rc; i++) {
        const struct perta_factor *f = &factors->of[i];
        const struct perta_change *c = change_of(
            adapted, factors->llm, f->site, perta_llm_param(factors->llm, f->site.layer, f->param));
        struct perta_low_rank to = perta_factor_in(f, factors->values);
        rc = load_factor(&file, c, f, be, to, err);
    }
    if (!rc)
        rc = perta_file_unchanged(&file, err);
    perta_file_close(&file);
    return rc;
}
