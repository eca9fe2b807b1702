/* The header parser, given a file whose data is as long as it likes. */
#include "io/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* Data of 0 to 63 bytes follows a header that says where it starts; else all is there. */
    for (uint64_t extra = 0; extra < 64; extra += 8) {
        struct perta_header *header;
        struct perta_err err = {0};
        if (!perta_safetensors_parse(data, size, size + extra, "f", &header, &err))
            perta_header_free(header);
        else if (!err.code || !err.msg[0])
            __builtin_trap();
    }
    return 0;
}
