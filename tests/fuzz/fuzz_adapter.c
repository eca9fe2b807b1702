/* A LoRA adapter for a small model. The input is adapter_config.json and, after a NUL, the header
 * of adapter_model.safetensors, to which this target adds the length and the data (zeros). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "estimators/edit/adapter.h"
#include "io/file.h"
#include "tests/fuzz/folder.h"

#define DATA_MAX (1 << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct perta_checkpoint *model;

static void close_model(void)
{
    perta_checkpoint_close(model);
}

/* Llama's names, tied embeddings, and a tensor that cannot be edited. */
static void put_model(void)
{
    static uint64_t square[] = {6, 4}, embedding[] = {9, 4}, vector[] = {4};
    struct perta_tensor tensors[] = {
        {"model.embed_tokens.weight", PERTA_BF16, 2, embedding, 36, 0, 0},
        {"model.layers.0.self_attn.q_proj.weight", PERTA_F32, 2, square, 24, 0, 0},
        {"model.layers.0.self_attn.q_proj.bias", PERTA_F32, 1, vector, 4, 0, 0},
        {"model.norm.weight", PERTA_F16, 1, vector, 4, 0, 0},
        {"ids", PERTA_U8, 1, vector, 4, 0, 0},
    };
    uint8_t *header, zeros[256] = {0};
    uint64_t len_bytes, n = sizeof tensors / sizeof *tensors;
    struct perta_err err = {0};
    if (perta_safetensors_build(tensors, n, NULL, &header, &len_bytes, &err))
        abort();
    FILE *file = create("model.safetensors");
    put(file, header, len_bytes);
    put(file, zeros, tensors[n - 1].off_bytes + tensors[n - 1].len_bytes - len_bytes);
    fclose(file);
    free(header);
    static const char config[] = "{\"tie_word_embeddings\": true}";
    put_file("config.json", config, sizeof config - 1);
}

static void enter(void)
{
    char path[128];
    struct perta_err err = {0};
    make_folder();
    put_model();
    if (perta_checkpoint_open(dir, &model, &err))
        abort();
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (unlink(path) || atexit(close_model)) /* then the folder holds an adapter */
        abort();
}

/* Where the data end according to the header. */
static size_t data_bytes(const char *header, size_t size)
{
    json_int_t end = 0;
    const char *name;
    json_t *root = json_loadb(header, size, 0, NULL), *tensor;
    json_object_foreach (root, name, tensor) {
        json_t *offsets = json_object_get(tensor, "data_offsets");
        json_int_t at = json_integer_value(json_array_get(offsets, 1));
        end = at > end ? at : end;
    }
    json_decref(root);
    return end > DATA_MAX ? DATA_MAX : (size_t)end;
}

static void put_adapter(const uint8_t *data, size_t size)
{
    static const uint8_t zeros[DATA_MAX];
    const uint8_t *nul = memchr(data, 0, size);
    size_t config = nul ? (size_t)(nul - data) : size;
    const uint8_t *header = nul ? nul + 1 : data;
    uint64_t n = nul ? size - config - 1 : 0;
    put_file("adapter_config.json", data, config);
    FILE *file = create("adapter_model.safetensors");
    put(file, &n, sizeof n);
    put(file, header, n);
    put(file, zeros, data_bytes((const char *)header, n));
    fclose(file);
}

/* The factors are zero, and therefore the task vector is. */
static void use(struct perta_adapter *adapter, const struct perta_checkpoint *ck)
{
    struct perta_file file = {.fd = -1};
    struct perta_err err = {0};
    if (perta_file_open(&file, ck->shards[0].path, false, &err) ||
        perta_adapter_begin(adapter, 1, &err))
        abort();
    for (uint64_t i = 0; i < model->n_tensors; i++) {
        const struct perta_tensor *tensor = model->by_name[i].tensor;
        const struct perta_change *change = perta_adapter_find(adapter, tensor->name);
        const float *tau;
        if (!change || change->whole)
            continue;
        if (perta_adapter_tau(adapter, &file, 0, change, 1, tensor->n_elems - 1, &tau, &err) ||
            tau[0] != 0 || tau[tensor->n_elems - 2] != 0)
            __builtin_trap();
    }
    perta_file_close(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!dir[0])
        enter();
    put_adapter(data, size);
    struct perta_checkpoint *ck;
    struct perta_adapter *adapter;
    struct perta_err err = {0};
    json_t *notes = json_array();
    if (!perta_checkpoint_is_adapter(dir))
        abort();
    int rc = perta_checkpoint_open_adapter(dir, &ck, &err);
    if (!rc) {
        rc = perta_adapter_open(ck, model, &adapter, notes, &err);
        if (!rc) {
            json_decref(perta_adapter_recipe(ck));
            use(adapter, ck);
            perta_adapter_close(adapter);
        }
        perta_checkpoint_close(ck);
    }
    if (rc != err.code || (rc && !err.msg[0]))
        __builtin_trap();
    json_decref(notes);
    return 0;
}
