/* LoRAs of a mixture's experts, as PEFT's target_parameters makes them: of the parameters that
 * transformers 5 has in memory, gate_up_proj (experts, 2 I, H) and down_proj (experts, H, I), with one
 * A and one B for all experts. Files mostly have a tensor for each expert. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/adapter.h"
#include "estimators/edit/adapter_config.h"
#include "io/text.h"

typedef unsigned long long ull;

/* A LoRA of all experts of a layer. */
struct fused {
    const struct perta_change *from;
    size_t of_module;           /* length of the module's name in from->target: "...mlp.experts" */
    uint64_t n, in, out;        /* A is (n, in), B (out, n): n is experts times rank */
    bool is_transposed;         /* parameters are (experts, in, out) */
    struct perta_change *found; /* changes of the tensors of the file */
    uint64_t n_found;
};

/* ---- names ---- */

/* The length of the name of the module of all experts; 0 if target is another tensor. Wrappers of
 * several parameters of a module are within each other, as base_layer. */
static size_t experts_module(const char *target)
{
    static const char weight[] = ".weight", base[] = ".base_layer", experts[] = ".experts";
    size_t n = strlen(target);
    if (!perta_text_ends_in(target, weight))
        return 0;
    n -= strlen(weight);
    while (n > strlen(base) && !memcmp(target + n - strlen(base), base, strlen(base)))
        n -= strlen(base);
    return n > strlen(experts) && !memcmp(target + n - strlen(experts), experts, strlen(experts))
               ? n
               : 0;
}

/* name with what in it replaced by instead, in buf; NULL if it does not have what. */
static const char *renamed(const char *name, const char *what, const char *instead, char *buf,
                           size_t room)
{
    const char *at = strstr(name, what);
    if (!at)
        return NULL;
    snprintf(buf, room, "%.*s%s%s", (int)(at - name), name, instead, at + strlen(what));
    return buf;
}

#define NAME_BYTES 512

/* ---- tensors of the file ---- */

static bool add(struct fused *f, const char *name, struct perta_change change)
{
    change.target = strdup(name);
    change.a = f->from->a;
    change.b = f->from->b;
    struct perta_change *more = realloc(f->found, (f->n_found + 1) * sizeof *more);
    if (more)
        f->found = more;
    if (!more || !change.target) {
        free(change.target);
        return false;
    }
    f->found[f->n_found++] = change;
    return true;
}

/* One tensor for all experts. Sets *is_there if its shape is that of A and B. */
static bool add_together(struct fused *f, const struct perta_checkpoint *model, const char *name,
                         bool *is_there)
{
    const struct perta_ref *ref = perta_checkpoint_find(model, name);
    const struct perta_tensor *t = ref ? ref->tensor : NULL;
    uint64_t in = t && t->n_dims == 3 ? t->shape[f->is_transposed ? 1 : 2] : 0;
    uint64_t out = in ? t->shape[f->is_transposed ? 2 : 1] : 0;
    *is_there = in && in == f->in && out == f->out;
    if (!*is_there)
        return true;
    return add(f, name,
               (struct perta_change){.is_swapped = f->is_transposed,
                                     .rows = t->shape[1],
                                     .width = t->shape[2],
                                     .n_experts = t->shape[0],
                                     .n_matrices = t->shape[0]});
}

static const struct perta_tensor *matrix_of(const struct perta_checkpoint *model,
                                            const char *module, uint64_t expert, const char *name,
                                            char buf[NAME_BYTES])
{
    snprintf(buf, NAME_BYTES, "%s.%llu.%s.weight", module, (ull)expert, name);
    const struct perta_ref *ref = perta_checkpoint_find(model, buf);
    return ref && ref->tensor->n_dims == 2 ? ref->tensor : NULL;
}

/* The tensors of that name (gate_proj, ...) of all experts, whose rows follow b_first rows of B. */
static bool add_apart(struct fused *f, const struct perta_checkpoint *model, const char *module,
                      const char *name, uint64_t b_first)
{
    char buf[NAME_BYTES];
    const struct perta_tensor *t;
    uint64_t n = 0;
    bool ok = true;
    while (matrix_of(model, module, n, name, buf))
        n++;
    for (uint64_t e = 0; e < n && ok; e++) {
        t = matrix_of(model, module, e, name, buf);
        ok = add(f, buf,
                 (struct perta_change){.rows = t->shape[0],
                                       .width = t->shape[1],
                                       .n_experts = n,
                                       .expert = e,
                                       .n_matrices = 1,
                                       .b_first = b_first});
    }
    return ok;
}

/* Experts in tensors of their own, by names for gate, up, down. */
static bool find_apart(struct fused *f, const struct perta_checkpoint *model, const char *module,
                       const char *const names[3])
{
    char buf[NAME_BYTES];
    const struct perta_tensor *gate = matrix_of(model, module, 0, names[0], buf);
    const struct perta_tensor *down = matrix_of(model, module, 0, names[2], buf);
    if (!gate || !down)
        return true;
    if (f->in == gate->shape[1] && f->out == 2 * gate->shape[0])
        return add_apart(f, model, module, names[0], 0) &&
               add_apart(f, model, module, names[1], gate->shape[0]);
    if (f->in == down->shape[1] && f->out == down->shape[0])
        return add_apart(f, model, module, names[2], 0);
    return true;
}

/* Find the tensors, with the names of published files and those in memory. False: out of memory. */
static bool find_tensors(struct fused *f, const struct perta_checkpoint *model)
{
    static const char *const qwen[] = {"gate_proj", "up_proj", "down_proj"};
    static const char *const mixtral[] = {"w1", "w3", "w2"};
    static const char *const together[] = {".experts.gate_up_proj", ".experts.down_proj",
                                           ".input_linear.weight", ".output_linear.weight"};
    char module[NAME_BYTES], name[NAME_BYTES], other[NAME_BYTES];
    size_t n = f->of_module - strlen(".experts");
    bool found = false, ok = true;
    for (size_t i = 0; i < sizeof together / sizeof *together && !found && ok; i++) {
        snprintf(name, sizeof name, "%.*s%s", (int)n, f->from->target, together[i]);
        ok = add_together(f, model, name, &found);
    }
    snprintf(module, sizeof module, "%.*s", (int)f->of_module, f->from->target);
    if (ok && !found)
        ok = find_apart(f, model, module, qwen);
    if (ok && !found &&
        renamed(module, ".mlp.experts", ".block_sparse_moe.experts", other, NAME_BYTES))
        ok = find_apart(f, model, other, mixtral);
    return ok;
}

/* ---- rank and scaling ---- */

/* What PEFT calls the parameter: the pattern keys of the config refer to it. */
static void parameter_of(const struct fused *f, char name[NAME_BYTES])
{
    const struct perta_change *c = &f->found[0];
    bool is_down = perta_text_ends_in(c->target, "down_proj") ||
                   perta_text_ends_in(c->target, "down_proj.weight") ||
                   perta_text_ends_in(c->target, ".w2.weight") ||
                   perta_text_ends_in(c->target, "output_linear.weight");
    snprintf(name, NAME_BYTES, "%.*s.%s", (int)f->of_module, f->from->target,
             is_down ? "down_proj" : "gate_up_proj");
}

static int check_rank(const struct fused *f, const struct perta_adapter *adapter,
                      const struct perta_adapter_config *config, struct perta_err *err)
{
    char name[NAME_BYTES];
    uint64_t rank, n = f->found[0].n_experts;
    float scaling;
    parameter_of(f, name);
    int rc = perta_adapter_config_allows(config, name, strlen(name), err);
    if (!rc)
        rc = perta_adapter_config_scale(config, name, strlen(name), &rank, &scaling, err);
    if (rc)
        return rc;
    if (f->n != n * rank)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s has %llu rows, but %llu are needed: %s has %llu experts, "
                          "and its rank is %llu in " PERTA_ADAPTER_CONFIG,
                          adapter->ck->shards[0].path, f->from->a->tensor->name, (ull)f->n,
                          (ull)(n * rank), name, (ull)n, (ull)rank);
    for (uint64_t i = 0; i < f->n_found; i++) {
        if (f->found[i].n_experts != n || f->found[i].rows != f->found[0].rows ||
            f->found[i].width != f->found[0].width)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: tensor %s: experts of --model have different shapes, or some "
                              "are missing",
                              adapter->ck->shards[0].path, f->from->a->tensor->name);
        f->found[i].r = rank;
        f->found[i].scaling = scaling;
    }
    return 0;
}

/* ---- a change ---- */

static int check_factor(const struct perta_adapter *adapter, const struct perta_tensor *t,
                        struct perta_err *err)
{
    const char *path = adapter->ck->shards[0].path;
    if (!perta_dtype_is_editable(t->dtype) || t->dtype == PERTA_F64)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16 or F32 needed", path,
                          t->name, perta_dtype_name(t->dtype));
    if (t->n_dims != 2)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: not a matrix", path, t->name);
    return 0;
}

static int expand(struct fused *f, const struct perta_adapter *adapter,
                  const struct perta_adapter_config *config, const struct perta_checkpoint *model,
                  struct perta_err *err)
{
    const struct perta_tensor *a = f->from->a->tensor, *b = f->from->b->tensor;
    const char *type = json_string_value(json_object_get(model->config, "model_type"));
    int rc = check_factor(adapter, a, err);
    if (!rc)
        rc = check_factor(adapter, b, err);
    if (rc)
        return rc;
    f->n = a->shape[0];
    f->in = a->shape[1];
    f->out = b->shape[0];
    f->is_transposed = type && (!strcmp(type, "gpt_oss") || !strcmp(type, "openai_privacy_filter"));
    if (b->shape[1] != f->n)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensors %s and %s: the one's rows and the other's columns differ "
                          "in number",
                          adapter->ck->shards[0].path, a->name, b->name);
    if (!find_tensors(f, model))
        return perta_fail_sys(err, ENOMEM, "%s", adapter->ck->path);
    if (!f->n_found)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: --model %s has no experts in %.*s whose shape fits "
                          "[%llu, %llu] of A and [%llu, %llu] of B",
                          adapter->ck->shards[0].path, a->name, model->path, (int)f->of_module,
                          f->from->target, (ull)f->n, (ull)f->in, (ull)f->out, (ull)f->n);
    return check_rank(f, adapter, config, err);
}

/* Put the changes that were found in place of change number i. */
static bool replace(struct perta_adapter *adapter, uint64_t *i, struct fused *f)
{
    uint64_t n = adapter->n_changes + f->n_found - 1;
    struct perta_change *of = realloc(adapter->changes, (n + 1) * sizeof *of);
    if (!of)
        return false;
    adapter->changes = of;
    free(of[*i].target);
    memmove(of + *i + f->n_found, of + *i + 1, (adapter->n_changes - *i - 1) * sizeof *of);
    memcpy(of + *i, f->found, f->n_found * sizeof *of);
    adapter->n_changes = n;
    *i += f->n_found;
    f->n_found = 0;
    return true;
}

/* A parameter of two dimensions, which files have under another name: a router. */
static int rename_target(struct perta_change *change, const struct perta_checkpoint *model,
                         struct perta_err *err)
{
    static const char *const names[][2] = {
        {".mlp.gate.", ".block_sparse_moe.gate."},
        {".mlp.router.", ".block_sparse_moe.gate."},
        {".block_sparse_moe.router.", ".block_sparse_moe.router.layer."},
    };
    char other[NAME_BYTES];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (perta_checkpoint_find(model, change->target) ||
            !renamed(change->target, names[i][0], names[i][1], other, sizeof other) ||
            !perta_checkpoint_find(model, other))
            continue;
        char *copy = strdup(other);
        if (!copy)
            return perta_fail_sys(err, ENOMEM, "adapter");
        free(change->target);
        change->target = copy;
    }
    return 0;
}

int perta_adapter_expand(struct perta_adapter *adapter, const struct perta_adapter_config *config,
                         const struct perta_checkpoint *model, struct perta_err *err)
{
    int rc = 0;
    for (uint64_t i = 0; i < adapter->n_changes && !rc;) {
        struct perta_change *change = &adapter->changes[i];
        struct fused f = {.from = change, .of_module = experts_module(change->target)};
        if (change->whole || !f.of_module || perta_checkpoint_find(model, change->target)) {
            rc = change->whole ? 0 : rename_target(change, model, err);
            i++;
            continue;
        }
        rc = expand(&f, adapter, config, model, err);
        if (!rc && !replace(adapter, &i, &f))
            rc = perta_fail_sys(err, ENOMEM, "%s", adapter->ck->path);
        for (uint64_t k = 0; k < f.n_found; k++)
            free(f.found[k].target);
        free(f.found);
    }
    return rc;
}
