#include "io/format/index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/plain.h"
#include "io/text.h"

static bool add_entry(struct perta_index *index, const char *tensor, const char *shard)
{
    if (index->n == index->room) {
        size_t room = index->room ? 2 * index->room : 256;
        void *grown = realloc(index->entries, room * sizeof *index->entries);
        if (!grown)
            return false;
        index->entries = grown;
        index->room = room;
    }
    index->entries[index->n++] = (struct perta_index_entry){tensor, shard};
    return true;
}

static int compare_entries(const void *a, const void *b)
{
    const struct perta_index_entry *x = a, *y = b;
    return strcmp(x->tensor, y->tensor);
}

/* False if a tensor occurs twice. */
static bool sort_entries(struct perta_index *index)
{
    bool sorted = true;
    for (size_t i = 1; i < index->n && sorted; i++)
        sorted = compare_entries(&index->entries[i - 1], &index->entries[i]) < 0;
    if (sorted)
        return true;
    qsort(index->entries, index->n, sizeof *index->entries, compare_entries);
    for (size_t i = 1; i < index->n; i++)
        if (!compare_entries(&index->entries[i - 1], &index->entries[i]))
            return false;
    return true;
}

/* Terminate strings in place, at their closing quotes: the text is ours. */
static bool plain_entry(struct perta_index *index, struct perta_plain *p)
{
    const char *tensor, *shard;
    size_t n, m;
    if (!perta_plain_string(p, &tensor, &n) || !perta_plain_word(p, ":") ||
        !perta_plain_string(p, &shard, &m) || !add_entry(index, tensor, shard))
        return false;
    index->text[tensor + n - index->text] = '\0';
    index->text[shard + m - index->text] = '\0';
    return true;
}

static bool plain_map(struct perta_index *index, struct perta_plain *p)
{
    if (!perta_plain_word(p, "{"))
        return false;
    for (size_t i = 0; !perta_plain_word(p, "}"); i++)
        if ((i && !perta_plain_word(p, ",")) || !plain_entry(index, p))
            return false;
    return true;
}

/* Parse {"metadata": anything, "weight_map": {...}}, in either order. False for anything else. */
static bool plain_index(struct perta_index *index, size_t len_bytes)
{
    struct perta_plain p = {index->text, index->text + len_bytes};
    bool had_map = false, had_metadata = false;
    if (!perta_plain_word(&p, "{"))
        return false;
    for (size_t i = 0; !perta_plain_word(&p, "}"); i++) {
        const char *key;
        size_t len;
        json_t *metadata;
        if ((i && !perta_plain_word(&p, ",")) || !perta_plain_string(&p, &key, &len) ||
            !perta_plain_word(&p, ":"))
            return false;
        if (perta_plain_is(key, len, "weight_map") && !had_map) {
            had_map = plain_map(index, &p);
        } else if (perta_plain_is(key, len, "metadata") && !had_metadata) {
            had_metadata = perta_plain_value(&p, &metadata);
            json_decref(metadata);
        } else {
            return false;
        }
        if (had_map + had_metadata != (int)i + 1)
            return false;
    }
    return perta_plain_word(&p, "") && had_map && sort_entries(index);
}

/* Parse any valid JSON, as a tree. */
static int read_tree(struct perta_index *index, int fd, const char *path, struct perta_err *err)
{
    index->n = 0;
    int rc = lseek(fd, 0, SEEK_SET) ? perta_fail_sys(err, errno, "%s", path)
                                    : perta_json_load(fd, path, &index->tree, err);
    if (rc)
        return rc;
    json_t *map = json_object_get(index->tree, "weight_map"), *value;
    const char *tensor;
    if (!json_is_object(map))
        return perta_fail(err, PERTA_EINPUT, "%s: no object \"weight_map\"", path);
    json_object_foreach (map, tensor, value)
        if (!add_entry(index, tensor, json_string_value(value)))
            return perta_fail_sys(err, ENOMEM, "%s", path);
    sort_entries(index);
    return 0;
}

static int read_any(struct perta_index *index, const char *path, struct perta_err *err)
{
    struct stat st;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    size_t len_bytes = (size_t)st.st_size;
    index->text = malloc(len_bytes + 1);
    int rc = index->text ? perta_pread_all(fd, index->text, len_bytes, 0, path, err)
                         : perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc && !plain_index(index, len_bytes))
        rc = read_tree(index, fd, path, err);
    close(fd);
    return rc;
}

int perta_index_read(const char *path, struct perta_index **out, struct perta_err *err)
{
    *out = NULL;
    struct perta_index *index = calloc(1, sizeof *index);
    int rc = index ? read_any(index, path, err) : perta_fail_sys(err, ENOMEM, "%s", path);
    if (rc)
        perta_index_free(index);
    else
        *out = index;
    return rc;
}

void perta_index_free(struct perta_index *index)
{
    if (!index)
        return;
    free(index->text);
    json_decref(index->tree);
    free(index->entries);
    free(index);
}
