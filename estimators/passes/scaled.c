#include "estimators/passes/scaled.h"

#include <stdlib.h>
#include <string.h>

#include "estimators/edit/box.h"
#include "estimators/edit/edit.h"
#include "estimators/edit/kernels.h"
#include "estimators/model/weights.h"
#include "io/format/naming.h"
#include "io/hash.h"
#include "io/text.h"
#include "stream/journal.h"

static const char *const roles[PERTA_SCALED_N] = {"--tuned", "--base", "scales"};

/* Elements that are computed at a time. */
#define PIECE (1u << 18)

/* ---- a piece ---- */

/* NULL: there is nothing to read. */
static const struct perta_ref *find(const struct perta_scaled *s, int role, const char *name)
{
    if (!s->in[role].ck)
        return NULL;
    return perta_adapter_operand(role == PERTA_SCALED_SCALE ? NULL : s->adapter, s->in[role].ck,
                                 name, s->tied);
}

static uint8_t *room_of(const struct perta_scaled *s, int i)
{
    return s->source.room + (uint64_t)i * s->source.room_bytes / (PERTA_SCALED_N + 1);
}

static int bad_number(const struct perta_scaled *s, const struct perta_ref *model, uint64_t elem,
                      enum perta_operand operand, struct perta_err *err)
{
    const struct perta_change *lora = perta_adapter_lora(s->adapter, model->tensor->name);
    static const char *const what[PERTA_N_OPERANDS] = {
        [PERTA_IN_MODEL] = "in --model",
        [PERTA_IN_TUNED] = "in --tuned",
        [PERTA_IN_BASE] = "in --base",
        [PERTA_IN_SCALE] = "in the scales",
        [PERTA_IN_RESULT] = "once it is scaled and subtracted",
    };
    if (lora && operand == PERTA_IN_TUNED)
        return perta_adapter_bad_number(s->adapter, 0, lora, elem, false, err);
    return perta_fail(err, PERTA_EINPUT, "%s: tensor %s, element %llu: not a finite number %s",
                      s->model->path, model->tensor->name, (unsigned long long)elem, what[operand]);
}

/* to (n) = elements first.. of the model's tensor after the edit. in: views of all operands. */
static int edit(const struct perta_scaled *s, const struct perta_ref *model, uint64_t first,
                const struct perta_edit_in *in, uint8_t *to, struct perta_err *err)
{
    const struct perta_rule rule = {.method = PERTA_SCALE};
    const float alpha = 1;
    struct perta_edit_counts counts;
    void *out = to;
    perta_edit(&rule, in, &alpha, 1, &out, &counts);
    return counts.n_nonfinite
               ? bad_number(s, model, first + counts.bad_elem, counts.bad_operand, err)
               : 0;
}

/* The size of the model's tensor in the box; 0 if there is no box. */
static float box_of(const struct perta_scaled *s, const struct perta_ref *model)
{
    const struct perta_ref *ref = find(s, PERTA_SCALED_TUNED, model->tensor->name);
    return s->box_sizes ? s->box_sizes[ref - s->in[PERTA_SCALED_TUNED].ck->by_name] : 0;
}

/* If the task vector is a LoRA's, set *tuned to elements first.. (n) of it. */
static int multiply(const struct perta_scaled *s, const struct perta_ref *model, uint64_t first,
                    uint64_t n, struct perta_view *tuned, struct perta_err *err)
{
    const struct perta_change *lora = perta_adapter_lora(s->adapter, model->tensor->name);
    const float *tau = NULL;
    if (!lora)
        return 0;
    int rc = perta_adapter_tau(s->adapter, &s->in[PERTA_SCALED_TUNED].files[0], 0, lora, first, n,
                               &tau, err);
    *tuned = (struct perta_view){PERTA_F32, tau};
    return rc;
}

/* Take scales first.. (n) of a tensor as 0 where they are dropped. Copies them to their room. */
static void drop(const struct perta_scaled *s, const char *name, uint64_t first, uint64_t n,
                 struct perta_view *scale)
{
    uint64_t width = perta_dtype_unit_bytes(scale->dtype);
    uint64_t state = s->drop_seed ^ perta_hash64(name, strlen(name));
    uint8_t *room = room_of(s, 1 + PERTA_SCALED_SCALE);
    memmove(room, scale->data, n * width);
    for (uint64_t i = 0; i < n; i++)
        if (perta_random_weight(state, first + i) < s->drop)
            memset(room + i * width, 0, width);
    scale->data = room;
}

static int read_piece(struct perta_scaled *s, struct perta_weights *w,
                      const struct perta_ref *model, uint64_t first, uint64_t n, uint8_t *to,
                      struct perta_err *err)
{
    struct perta_view views[PERTA_SCALED_N + 1] = {0};
    bool edited = find(s, PERTA_SCALED_SCALE, model->tensor->name);
    int rc = 0;
    for (int i = 0; i <= (edited ? PERTA_SCALED_N : 0) && !rc; i++) {
        const struct perta_ref *ref = i ? find(s, i - 1, model->tensor->name) : model;
        if (!ref)
            continue;
        struct perta_file *file = i ? &s->in[i - 1].files[ref->shard] : &w->files[ref->shard];
        uint64_t width = perta_dtype_unit_bytes(ref->tensor->dtype);
        views[i].dtype = ref->tensor->dtype;
        rc = perta_weights_read(w, file, ref->tensor->off_bytes + first * width, n * width,
                                room_of(s, i), &views[i].data, err);
    }
    if (!rc && !edited)
        memcpy(to, views[0].data, n * perta_dtype_unit_bytes(views[0].dtype));
    if (!rc && edited && s->drop > 0)
        drop(s, find(s, PERTA_SCALED_SCALE, model->tensor->name)->tensor->name, first, n,
             &views[1 + PERTA_SCALED_SCALE]);
    if (!rc && edited)
        rc = multiply(s, model, first, n, &views[1], err);
    if (rc || !edited)
        return rc;
    const struct perta_edit_in in = {.model = views[0],
                                     .tuned = views[1],
                                     .base = views[2],
                                     .scale = views[3],
                                     .n = n,
                                     .box = box_of(s, model)};
    return edit(s, model, first, &in, to, err);
}

static int read_scaled(struct perta_source *source, struct perta_weights *w,
                       const struct perta_ref *ref, uint64_t off_bytes, uint64_t len_bytes,
                       uint8_t *to, struct perta_err *err)
{
    struct perta_scaled *s = (struct perta_scaled *)source;
    uint64_t width = perta_dtype_unit_bytes(ref->tensor->dtype);
    uint64_t first = off_bytes / width, n = len_bytes / width;
    int rc = 0;
    for (uint64_t at = 0; at < n && !rc; at += PIECE)
        rc = read_piece(s, w, ref, first + at, n - at < PIECE ? n - at : PIECE, to + at * width,
                        err);
    return rc;
}

/* ---- open, close ---- */

static int paths(const struct perta_source *source, const char ***list, size_t *n,
                 struct perta_err *err)
{
    const struct perta_scaled *s = (const struct perta_scaled *)source;
    int rc = 0;
    for (int i = 0; i < PERTA_SCALED_N && !rc; i++)
        if (s->in[i].ck)
            rc = perta_input_paths(&s->in[i], list, n, err);
    return rc;
}

static int open_files(struct perta_source *source, bool direct, struct perta_err *err)
{
    struct perta_scaled *s = (struct perta_scaled *)source;
    int rc = 0;
    for (int i = 0; i < PERTA_SCALED_N && !rc; i++)
        if (s->in[i].ck)
            rc = perta_input_open_files(&s->in[i], direct && !s->in[i].ck->is_adapter, err);
    return rc;
}

static int unchanged(const struct perta_source *source, struct perta_err *err)
{
    const struct perta_scaled *s = (const struct perta_scaled *)source;
    int rc = 0;
    for (int i = 0; i < PERTA_SCALED_N && !rc; i++)
        if (s->in[i].ck)
            rc = perta_input_unchanged(&s->in[i], err);
    return rc;
}

static const struct perta_source_ops ops = {paths, open_files, read_scaled, unchanged};

/* Is no operand of that role read for the tensor of that name? */
static bool needs_none(const struct perta_scaled *s, int role, const char *name)
{
    if (role == PERTA_SCALED_BASE && s->box_sizes)
        return true;
    return role != PERTA_SCALED_SCALE && perta_adapter_lora(s->adapter, name);
}

static int no_operand(const struct perta_scaled *s, int role, const char *name,
                      struct perta_err *err)
{
    if (!s->in[role].ck)
        return perta_fail(err, PERTA_EUSAGE,
                          "base (of at) is needed: %s stores %s whole, not as the change that "
                          "tuning made",
                          s->in[PERTA_SCALED_TUNED].ck->path, name);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: no tensor %s, which --model has; is it another architecture, "
                      "or an adapter? --exclude leaves tensors out",
                      s->in[role].ck->path, name);
}

static int check_tensor(const struct perta_scaled *s, const struct perta_tensor *scale,
                        struct perta_err *err)
{
    const struct perta_ref *model = perta_checkpoint_find(s->model, scale->name);
    if (!model)
        return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s, for which there are scales",
                          s->model->path, scale->name);
    for (int i = 0; i < PERTA_SCALED_N; i++) {
        const struct perta_ref *ref = find(s, i, scale->name);
        if (needs_none(s, i, scale->name))
            continue;
        if (!ref)
            return no_operand(s, i, scale->name, err);
        bool is_box = i == PERTA_SCALED_TUNED && s->box_sizes;
        if (is_box ? ref->tensor->dtype != PERTA_I8 : !perta_dtype_is_editable(ref->tensor->dtype))
            return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; %s needed",
                              s->in[i].ck->path, scale->name, perta_dtype_name(ref->tensor->dtype),
                              is_box ? "I8" : "BF16, F16, F32 or F64");
        int rc = perta_shapes_agree("--model", model->tensor, roles[i], ref->tensor, err);
        if (rc)
            return rc;
    }
    return 0;
}

static uint64_t widest(const struct perta_checkpoint *ck)
{
    uint64_t most = 1;
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        uint64_t width = perta_dtype_unit_bytes(ck->by_name[i].tensor->dtype);
        most = width > most ? width : most;
    }
    return most;
}

/* Open an adapter in place of a tuned checkpoint. */
static int open_adapter(struct perta_scaled *s, const char *path, struct perta_err *err)
{
    struct perta_input *in = &s->in[PERTA_SCALED_TUNED];
    int rc = perta_adapter_open_input(in, roles[PERTA_SCALED_TUNED], path, s->model, &s->adapter,
                                      NULL, err);
    if (!rc)
        rc = perta_adapter_begin(s->adapter, 1, err);
    if (!rc)
        s->source.heap_bytes = perta_adapter_memory(s->adapter);
    return rc;
}

int perta_scaled_open(struct perta_scaled *s, const struct perta_scaled_paths *from,
                      const struct perta_checkpoint *model, struct perta_err *err)
{
    const char *const all[PERTA_SCALED_N] = {from->box ? from->box : from->tuned, from->base,
                                             from->scale};
    *s = (struct perta_scaled){
        .source = {.ops = &ops},
        .model = model,
        .tied = perta_is_tied(model),
    };
    uint64_t width = widest(model);
    int rc = 0;
    for (int i = 0; i < PERTA_SCALED_N && !rc; i++) {
        if (i == PERTA_SCALED_BASE && (from->box || !from->base))
            continue;
        rc = i == PERTA_SCALED_TUNED && perta_checkpoint_is_adapter(all[i])
                 ? open_adapter(s, all[i], err)
                 : perta_input_open(&s->in[i], roles[i], all[i], err);
        uint64_t of_input = rc ? 0 : widest(s->in[i].ck);
        width = of_input > width ? of_input : width;
    }
    s->box_size = from->box_size;
    s->drop = (float)from->drop;
    s->drop_seed = from->drop_seed;
    if (!rc && from->box)
        rc = perta_box_sizes(s->in[PERTA_SCALED_TUNED].ck, from->box_size, &s->box_sizes, err);
    s->source.room_bytes = (PERTA_SCALED_N + 1) * perta_weights_room(PIECE * width);
    for (uint64_t t = 0; !rc && t < s->in[PERTA_SCALED_SCALE].ck->n_tensors; t++)
        rc = check_tensor(s, s->in[PERTA_SCALED_SCALE].ck->by_name[t].tensor, err);
    return rc;
}

void perta_scaled_close(struct perta_scaled *s)
{
    perta_adapter_close(s->adapter);
    for (int i = 0; i < PERTA_SCALED_N; i++)
        perta_input_close(&s->in[i]);
    free(s->box_sizes);
    *s = (struct perta_scaled){0};
}

static json_t *inputs_json(const struct perta_scaled *s)
{
    const struct perta_checkpoint *tuned = s->in[PERTA_SCALED_TUNED].ck,
                                  *base = s->in[PERTA_SCALED_BASE].ck,
                                  *scale = s->in[PERTA_SCALED_SCALE].ck;
    if (s->box_sizes)
        return json_pack("{s:o, s:f, s:o}", "box", perta_journal_own(tuned), "box size",
                         s->box_size, "scale", perta_journal_own(scale));
    json_t *json = json_pack("{s:o, s:o, s:o}", "tuned", perta_journal_checkpoint(tuned), "base",
                             base ? perta_journal_checkpoint(base) : json_null(), "scale",
                             perta_journal_own(scale));
    if (s->adapter)
        perta_json_set(&json, PERTA_ADAPTER_CONFIG, perta_journal_config(tuned));
    return json;
}

json_t *perta_scaled_json(const struct perta_scaled *s)
{
    json_t *json = inputs_json(s);
    if (s->drop > 0)
        perta_json_set(&json, "drop",
                       json_pack("[f, I]", (double)s->drop, (json_int_t)s->drop_seed));
    return json;
}
