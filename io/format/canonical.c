#include "io/format/canonical.h"

#include <fenv.h>
#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/fpenv.h"
#include "io/text.h"

static bool write_value(FILE *out, const json_t *value, int depth);

static void write_char(FILE *out, char c)
{
    putc_unlocked(c, out);
}

static void write_break(FILE *out, int depth)
{
    write_char(out, '\n');
    while (depth--)
        write_char(out, ' ');
}

static void write_string(FILE *out, const char *text, size_t len)
{
    static const char shorthand[] = "\"\"\\\\\bb\ff\nn\rr\tt"; /* pairs */
    write_char(out, '"');
    for (size_t i = 0; i < len; i++) {
        const char *pair = shorthand;
        if ((unsigned char)text[i] >= 0x20 && text[i] != '"' && text[i] != '\\') {
            write_char(out, text[i]);
            continue;
        }
        while (*pair && *pair != text[i])
            pair += 2;
        if (text[i] && *pair)
            fprintf(out, "\\%c", pair[1]);
        else
            fprintf(out, "\\u%04x", (unsigned)text[i]);
    }
    write_char(out, '"');
}

/* Print value with n digits after the first. True if they read back as value. glibc honours the
 * rounding mode when it prints. */
static bool spell(char text[40], int n, double value, int rounding)
{
    fesetround(rounding);
    snprintf(text, 40, "%.*e", n, value);
    fesetround(FE_TONEAREST);
    return strtod(text, NULL) == value;
}

/* Print the fewest significant digits that read back as the same number, and of those the nearest:
 * rounded to nearest, or rounded up for some powers of two, below which numbers lie closer. A
 * spelling of up to 15 digits reads back as itself, except for subnormal numbers: if one does, all
 * longer ones only add zeros, which are cut off. The layout is Python's: with an exponent below
 * 1e-4 and from 1e16 on, else with at least one digit on both sides of the point. */
static void write_real(FILE *out, double value)
{
    char text[40], digits[20] = "";
    int n = fabs(value) < DBL_MIN ? 0 : DBL_DIG - 1, k = 0;
    while (!spell(text, n, fabs(value), FE_TONEAREST) && !spell(text, n, fabs(value), FE_UPWARD))
        n++;
    int exponent = (int)strtol(strchr(text, 'e') + 1, NULL, 10);
    for (const char *from = text; *from != 'e'; from++)
        if (*from != '.')
            digits[k++] = *from;
    while (k > 1 && digits[k - 1] == '0')
        k--;
    fputs(signbit(value) ? "-" : "", out);
    if (exponent < -4 || exponent >= 16) {
        fprintf(out, "%c%s%.*se%+03d", digits[0], k > 1 ? "." : "", k - 1, digits + 1, exponent);
    } else if (exponent < 0) {
        fprintf(out, "0.%.*s%.*s", -exponent - 1, "000", k, digits);
    } else {
        for (int i = 0; i <= exponent; i++)
            write_char(out, i < k ? digits[i] : '0');
        fprintf(out, ".%.*s", k > exponent + 1 ? k - exponent - 1 : 1,
                k > exponent + 1 ? digits + exponent + 1 : "0");
    }
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool write_rows(FILE *out, const struct perta_canonical_rows *rows, int depth)
{
    bool ok = true;
    write_char(out, '[');
    for (uint64_t i = 0; i < rows->n && ok; i++) {
        json_t *row = rows->row(rows->ctx, i);
        fputs(i ? "," : "", out);
        write_break(out, depth + 1);
        ok = row && write_value(out, row, depth + 1);
        json_decref(row);
    }
    if (rows->n && ok)
        write_break(out, depth);
    if (ok) /* on failure the text stays visibly incomplete */
        write_char(out, ']');
    return ok;
}

/* False when out of memory, as for the functions below. */
static bool write_object(FILE *out, const json_t *object, int depth,
                         const struct perta_canonical_rows *rows)
{
    size_t n = json_object_size(object), i = 0;
    const char **keys = calloc(n + 1, sizeof *keys), *key;
    json_t *value;
    if (!keys)
        return false;
    json_object_foreach ((json_t *)(uintptr_t)object, key, value)
        keys[i++] = key;
    qsort(keys, n, sizeof *keys, by_bytes);
    bool ok = true;
    write_char(out, '{');
    for (i = 0; i < n && ok; i++) {
        fputs(i ? "," : "", out);
        write_break(out, depth + 1);
        write_string(out, keys[i], strlen(keys[i]));
        fputs(": ", out);
        ok = rows && !strcmp(keys[i], rows->key)
                 ? write_rows(out, rows, depth + 1)
                 : write_value(out, json_object_get(object, keys[i]), depth + 1);
    }
    if (n && ok)
        write_break(out, depth);
    if (ok)
        write_char(out, '}');
    free(keys);
    return ok;
}

static bool write_array(FILE *out, const json_t *array, int depth)
{
    size_t n = json_array_size(array);
    bool ok = true;
    write_char(out, '[');
    for (size_t i = 0; i < n && ok; i++) {
        fputs(i ? "," : "", out);
        write_break(out, depth + 1);
        ok = write_value(out, json_array_get(array, i), depth + 1);
    }
    if (n && ok)
        write_break(out, depth);
    if (ok)
        write_char(out, ']');
    return ok;
}

static bool write_value(FILE *out, const json_t *value, int depth)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return write_object(out, value, depth, NULL);
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

bool perta_canonical_print(FILE *out, const json_t *object, const struct perta_canonical_rows *rows)
{
    PERTA_FP_SCOPE;
    /* The host program may have set a locale with a decimal comma. */
    locale_t c = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    if (!c)
        return false;
    locale_t before = uselocale(c);
    bool ok = rows ? write_object(out, object, 0, rows) : write_value(out, object, 0);
    uselocale(before);
    freelocale(c);
    return ok;
}

static bool print(FILE *to, void *value)
{
    return perta_canonical_print(to, value, NULL);
}

char *perta_canonical_json(const json_t *value)
{
    size_t len;
    return perta_text_print(print, (json_t *)(uintptr_t)value, &len);
}
