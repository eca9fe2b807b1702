/* An adapter among the inputs of a job: opened as one, and what is read of it. */
#include "estimators/edit/adapter.h"

#include "io/format/naming.h"

int perta_adapter_open_input(struct perta_input *in, const char *role, const char *path,
                             const struct perta_checkpoint *model, struct perta_adapter **out,
                             json_t *notes, struct perta_err *err)
{
    *in = (struct perta_input){.role = role};
    int rc = perta_checkpoint_open_adapter(path, &in->ck, err);
    if (!rc)
        rc = perta_adapter_open(in->ck, model, out, notes, err);
    return rc ? perta_err_context(err, "%s", role) : 0;
}

const struct perta_change *perta_adapter_lora(const struct perta_adapter *adapter, const char *name)
{
    const struct perta_change *change = adapter ? perta_adapter_find(adapter, name) : NULL;
    return change && !change->whole ? change : NULL;
}

const struct perta_ref *perta_adapter_operand(const struct perta_adapter *adapter,
                                              const struct perta_checkpoint *ck, const char *name,
                                              bool tied)
{
    if (!adapter)
        return perta_tied_find(ck, name, tied);
    const struct perta_change *change = perta_adapter_find(adapter, name);
    if (!change || !change->whole)
        return NULL;
    return ck == adapter->ck ? change->whole : perta_tied_find(ck, name, tied);
}
