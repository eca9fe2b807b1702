/* scratch.h - a scratch folder for each case, and files in it. */
#ifndef PERTA_TESTS_SCRATCH_H
#define PERTA_TESTS_SCRATCH_H

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/format/safetensors.h"
#include "tests/unit.h"

static char scratch_dir[64];

/* Checked fixture: makes a new folder the working directory; on a disk, where O_DIRECT works. */
static inline void enter(void)
{
    snprintf(scratch_dir, sizeof scratch_dir, "/var/tmp/perta-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(scratch_dir));
    ck_assert_int_eq(chdir(scratch_dir), 0);
}

static inline void leave(void)
{
    ck_assert_int_eq(chdir("/"), 0);
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", scratch_dir);
    ck_assert_int_eq(system(command), 0);
}

static inline void put_file(const char *name, const void *data, size_t len_bytes)
{
    FILE *file = fopen(name, "w");
    ck_assert_msg(file, "%s", name);
    ck_assert_uint_eq(fwrite(data, 1, len_bytes, file), len_bytes);
    ck_assert_int_eq(fclose(file), 0);
}

/* The header of a file of such tensors, then room for their bytes. The caller's (free). */
static inline uint8_t *make_header(struct perta_tensor *tensors, uint64_t n, uint64_t data_bytes,
                                   uint64_t *header_bytes)
{
    struct perta_err err = {0};
    uint8_t *header;
    ck_assert_ok(perta_safetensors_build(tensors, n, NULL, &header, header_bytes, &err));
    uint8_t *bytes = alloc(*header_bytes + data_bytes);
    memcpy(bytes, header, *header_bytes);
    free(header);
    return bytes;
}

static inline void put_text(const char *name, const char *text)
{
    put_file(name, text, strlen(text));
}

/* Write len_bytes of noise to the file, and return them (free). */
/* A safetensors file of one byte. */
#define TINY_SHARD \
    "\x35\0\0\0\0\0\0\0{\"w\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}x"
#define TINY_SHARD_BYTES (sizeof TINY_SHARD - 1)

/* A checkpoint of that file in a new folder. */
static inline void put_tiny_model(const char *path, const char *config)
{
    char name[128];
    ck_assert_int_eq(mkdir(path, 0777), 0);
    snprintf(name, sizeof name, "%s/config.json", path);
    put_text(name, config);
    snprintf(name, sizeof name, "%s/model.safetensors", path);
    put_file(name, TINY_SHARD, TINY_SHARD_BYTES);
}

static inline uint8_t *make_file(const char *name, size_t len_bytes, uint64_t seed)
{
    uint8_t *data = alloc(len_bytes);
    fill_random(data, len_bytes, seed);
    put_file(name, data, len_bytes);
    return data;
}

/* Does the file hold exactly these bytes? */
static inline bool holds(const char *name, const void *data, size_t len_bytes)
{
    FILE *file = fopen(name, "r");
    if (!file)
        return false;
    uint8_t *have = alloc(len_bytes + 1);
    bool same = fread(have, 1, len_bytes + 1, file) == len_bytes && !memcmp(have, data, len_bytes);
    fclose(file);
    free(have);
    return same;
}

static inline bool is_there(const char *path)
{
    return !access(path, F_OK);
}

/* The number of entries in a folder. */
static inline unsigned count_entries(const char *path)
{
    DIR *dir = opendir(path);
    ck_assert_msg(dir, "%s", path);
    unsigned n = 0;
    for (struct dirent *entry; (entry = readdir(dir));)
        n += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(dir);
    return n;
}

/* The number of files that this process has open. */
static inline unsigned count_open_files(void)
{
    return count_entries("/proc/self/fd");
}

#endif
