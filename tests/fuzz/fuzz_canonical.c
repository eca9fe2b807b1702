/* The canonical spelling of any JSON: parsed again it is the same value, with the same spelling. */
#include "io/format/canonical.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
    json_t *value = json_loadb((const char *)data, size, flags, NULL);
    char *text = value ? perta_canonical_json(value) : NULL;
    json_t *again = text ? json_loads(text, flags, NULL) : NULL;
    char *text_again = again ? perta_canonical_json(again) : NULL;
    if (value && (!text_again || !json_equal(value, again) || strcmp(text, text_again)))
        __builtin_trap();
    json_decref(value);
    json_decref(again);
    free(text);
    free(text_again);
    return 0;
}
