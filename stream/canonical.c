#include "stream/canonical.h"

#include <fenv.h>
#include <locale.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool write_value(FILE *out, const json_t *value, int depth);

static void write_break(FILE *out, int depth)
{
    fprintf(out, "\n%*s", depth, "");
}

static void write_string(FILE *out, const char *text, size_t len)
{
    static const char shorthand[] = "\"\"\\\\\bb\ff\nn\rr\tt"; /* pairs */
    fputc('"', out);
    for (size_t i = 0; i < len; i++) {
        const char *pair = shorthand;
        while (*pair && *pair != text[i])
            pair += 2;
        if (text[i] && *pair)
            fprintf(out, "\\%c", pair[1]);
        else if ((unsigned char)text[i] < 0x20)
            fprintf(out, "\\u%04x", (unsigned)text[i]);
        else
            fputc(text[i], out);
    }
    fputc('"', out);
}

/* With n digits after the first; do they read back? glibc rounds what it prints as asked. */
static bool spell(char text[40], int n, double value, int rounding)
{
    fesetround(rounding);
    snprintf(text, 40, "%.*e", n, value);
    fesetround(FE_TONEAREST);
    return strtod(text, NULL) == value;
}

/* The fewest significant digits that read back as the same number, and of those the nearest:
 * rounded to nearest, or up from some powers of two, from which numbers below stand closer.
 * Spelled as Python does: with an exponent below 1e-4 and from 1e16 on, else with at least one
 * digit on both sides of the point. */
static void write_real(FILE *out, double value)
{
    char text[40], digits[20];
    int n = 0, k = 0;
    while (!spell(text, n, fabs(value), FE_TONEAREST) && !spell(text, n, fabs(value), FE_UPWARD))
        n++;
    int exponent = atoi(strchr(text, 'e') + 1);
    for (const char *from = text; *from != 'e'; from++)
        if (*from != '.')
            digits[k++] = *from;
    fputs(signbit(value) ? "-" : "", out);
    if (exponent < -4 || exponent >= 16) {
        fprintf(out, "%c%s%.*se%+03d", digits[0], k > 1 ? "." : "", k - 1, digits + 1, exponent);
    } else if (exponent < 0) {
        fprintf(out, "0.%.*s%.*s", -exponent - 1, "000", k, digits);
    } else {
        for (int i = 0; i <= exponent; i++)
            fputc(i < k ? digits[i] : '0', out);
        fprintf(out, ".%.*s", k > exponent + 1 ? k - exponent - 1 : 1,
                k > exponent + 1 ? digits + exponent + 1 : "0");
    }
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* false: no memory. So are the functions below. */
static bool write_object(FILE *out, const json_t *object, int depth)
{
    size_t n = json_object_size(object), i = 0;
    const char **keys = calloc(n + 1, sizeof *keys), *key;
    json_t *value;
    if (!keys)
        return false;
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
        keys[i++] = key;
    qsort(keys, n, sizeof *keys, by_bytes);
    bool ok = true;
    fputc('{', out);
    for (i = 0; i < n && ok; i++) {
        fputs(i ? "," : "", out);
        write_break(out, depth + 1);
        write_string(out, keys[i], strlen(keys[i]));
        fputs(": ", out);
        ok = write_value(out, json_object_get(object, keys[i]), depth + 1);
    }
    if (n)
        write_break(out, depth);
    fputc('}', out);
    free(keys);
    return ok;
}

static bool write_array(FILE *out, const json_t *array, int depth)
{
    size_t n = json_array_size(array);
    bool ok = true;
    fputc('[', out);
    for (size_t i = 0; i < n && ok; i++) {
        fputs(i ? "," : "", out);
        write_break(out, depth + 1);
        ok = write_value(out, json_array_get(array, i), depth + 1);
    }
    if (n)
        write_break(out, depth);
    fputc(']', out);
    return ok;
}

static bool write_value(FILE *out, const json_t *value, int depth)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return write_object(out, value, depth);
    case JSON_ARRAY:
        return write_array(out, value, depth);
    case JSON_STRING:
        write_string(out, json_string_value(value), json_string_length(value));
        break;
    case JSON_INTEGER:
        fprintf(out, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        break;
    case JSON_REAL:
        write_real(out, json_real_value(value));
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        fputs(json_is_true(value) ? "true" : "false", out);
        break;
    case JSON_NULL:
        fputs("null", out);
    }
    return true;
}

char *perta_canonical_json(const json_t *value)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return NULL;
    /* Whoever links the library may have set a locale with a decimal comma. */
    locale_t c = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    locale_t before = c ? uselocale(c) : (locale_t)0;
    bool ok = c && write_value(out, value, 0) && !ferror(out);
    if (c) {
        uselocale(before);
        freelocale(c);
    }
    if (fclose(out) || !ok) {
        free(text);
        return NULL;
    }
    return text;
}
