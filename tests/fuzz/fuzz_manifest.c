/* Records. The input is manifest.json of a folder that holds a model and a patch of one tensor
 * each: once as the manifest of the folder's files, once as the record of the patch. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/format/patch.h"
#include "io/hash.h"
#include "stream/patch/manifest.h"
#include "tests/fuzz/folder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Changes the model's one byte from x to y. */
static void put_patch(const uint8_t *shard, size_t header_bytes)
{
    struct perta_err err = {0};
    struct perta_header *header;
    struct perta_coded coded;
    uint8_t *head, *table, frame[256];
    uint64_t head_bytes, table_bytes;
    struct perta_codec *codec = perta_codec_new(1);
    if (!codec ||
        perta_safetensors_parse(shard, header_bytes, header_bytes + 1, "", &header, &err) ||
        perta_patch_head_build(header, header, &head, &head_bytes, &err) ||
        perta_codec_encode(codec, PERTA_U8, "x", "y", 1, frame, sizeof frame, &coded, &err))
        abort();
    struct perta_patch_entry entry = {.frame_off = head_bytes,
                                      .frame_bytes = coded.frame_bytes,
                                      .payload_bytes = coded.payload_bytes,
                                      .n_units = 1,
                                      .encoding = coded.encoding,
                                      .hash_before = perta_hash64("x", 1),
                                      .hash_after = perta_hash64("y", 1)};
    if (perta_patch_table_build(&entry, 1, &table, &table_bytes, &err))
        abort();
    FILE *file = create("model.perta");
    put(file, head, head_bytes);
    put(file, frame, coded.frame_bytes);
    put(file, table, table_bytes);
    fclose(file);
    perta_header_free(header);
    perta_codec_free(codec);
    free(head);
    free(table);
}

static void enter(void)
{
    static const uint8_t shard[] =
        "\x38\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}   x";
    make_folder();
    put_file("model.safetensors", shard, sizeof shard - 1);
    put_patch(shard, sizeof shard - 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!dir[0])
        enter();
    char path[128];
    snprintf(path, sizeof path, "%s/manifest.json", dir);
    put_file("manifest.json", data, size);
    struct perta_run run = {
        .memory_bytes = perta_memory_now() + (64 << 20), .n_threads = 1, .io = PERTA_IO_PREAD};
    for (int patch = 0; patch < 2; patch++) {
        struct perta_err err = {0};
        json_t *summary = NULL;
        int rc = patch ? perta_patch_verify(dir, &run, &summary, &err)
                       : perta_manifest_verify(dir, path, &run, &summary, &err);
        if (rc ? rc == PERTA_EUSAGE || rc != err.code || !err.msg[0] : !summary)
            __builtin_trap();
        json_decref(summary);
    }
    return 0;
}
