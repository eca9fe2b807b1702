/* A checkpoint folder: the input is its index and, after a NUL, its config.json. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "estimators/model/config.h"
#include "io/format/checkpoint.h"
#include "tests/fuzz/folder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void enter(void)
{
    static const char shard[] =
        "\x38\0\0\0\0\0\0\0"
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}   x";
    make_folder();
    put_file("s1.safetensors", shard, sizeof shard - 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!dir[0])
        enter();
    const uint8_t *nul = memchr(data, 0, size);
    size_t index = nul ? (size_t)(nul - data) : size;
    put_file("model.safetensors.index.json", data, index);
    put_file("config.json", nul ? nul + 1 : data, nul ? size - index - 1 : 0);
    struct perta_checkpoint *ck;
    struct perta_llm llm;
    struct perta_err err = {0};
    if (!perta_checkpoint_open(dir, &ck, &err)) {
        json_t *root = json_loadb((const char *)data, index, JSON_REJECT_DUPLICATES, NULL);
        const json_t *map = json_object_get(root, "weight_map");
        if (!json_is_object(map) || json_object_size(map) != ck->n_tensors)
            __builtin_trap(); /* must equal what a JSON library reads */
        json_decref(root);
        if (ck->config)
            perta_llm_parse(ck->config, "config.json", &llm, &err);
        perta_checkpoint_close(ck);
    } else if (!err.msg[0]) {
        __builtin_trap();
    }
    return 0;
}
