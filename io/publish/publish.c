#include "io/publish/publish.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/publish/owned.h"

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

static int remove_tree(const char *path)
{
    return nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

int perta_make_parents(const char *path, struct perta_err *err)
{
    char *copy = strdup(path);
    if (!copy)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    int rc = 0;
    for (char *slash = strchr(copy + 1, '/'); slash && !rc; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (!mkdir(copy, 0777))
            rc = perta_name_sync(copy, err);
        else if (errno != EEXIST)
            rc = perta_fail_sys(err, errno, "%s", copy);
        *slash = '/';
    }
    free(copy);
    return rc;
}

static bool is_empty_dir(const char *path)
{
    DIR *dir = opendir(path);
    if (!dir)
        return false;
    unsigned n = 0;
    while (n < 3 && readdir(dir))
        n++;
    closedir(dir);
    return n == 2; /* . and .. */
}

/* Does path end in . or ..? Beside such a name there is no place for a partial folder. */
static bool ends_in_dots(const char *path)
{
    size_t len = strlen(path);
    while (len && path[len - 1] == '/')
        len--;
    size_t n = 0;
    while (n < len && path[len - 1 - n] != '/')
        n++;
    return (n == 1 || n == 2) && !strncmp(path + len - n, "..", n);
}

/* May an output be written at path? *replace: it replaces one. like: see perta_owned_check. */
static int check_target(const char *path, const char *like, bool force, bool *replace,
                        struct perta_err *err)
{
    struct stat st;
    *replace = false;
    if (ends_in_dots(path))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: ends in . or .., which names no new folder; write "
                          "the folder's own name",
                          path);
    if (lstat(path, &st))
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", path);
    if (S_ISDIR(st.st_mode) && perta_is_mount_point(path))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: exists and is a mount point, which cannot be "
                          "replaced; give a folder in it",
                          path);
    if (S_ISDIR(st.st_mode) && is_empty_dir(path)) /* a link cannot be replaced by a rename */
        return 0;
    if (!force)
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: exists; choose another name, or --force to "
                          "replace it",
                          path);
    if (!S_ISDIR(st.st_mode))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: exists and is %s, not a folder; --force does not "
                          "replace it",
                          path, S_ISLNK(st.st_mode) ? "a link" : "a file");
    *replace = true;
    return perta_owned_check(path, PERTA_OWNED_OUTPUT, like, err);
}

/* Is ".." one of path's components? */
static bool goes_up(const char *path)
{
    for (const char *at = path; (at = strstr(at, "/..")); at += 3)
        if (!at[3] || at[3] == '/')
            return true;
    return false;
}

/* The real path of what may not exist yet: realpath of its longest part that exists, then the
 * rest. */
static int true_path(const char *path, char **out, struct perta_err *err)
{
    char *whole = path[0] == '/' ? strdup(path) : perta_path_join(".", path), *real = NULL;
    size_t len = whole ? strlen(whole) : 0;
    *out = NULL;
    while (whole && !real) {
        char next = whole[len];
        whole[len] = '\0';
        real = realpath(len ? whole : "/", NULL);
        whole[len] = next;
        while (!real && len && whole[--len] != '/')
            ;
    }
    const char *rest = real ? whole + len : "";
    int rc = 0;
    if (goes_up(rest)) /* its meaning depends on what is created first */
        rc = perta_fail(err, PERTA_EUSAGE, "%s: the folder before \"..\" does not exist", path);
    else if (!real || asprintf(out, "%s%s", strcmp(real, "/") ? real : "", rest) < 0)
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        for (size_t n = strlen(*out); n > 1 && (*out)[n - 1] == '/'; n--)
            (*out)[n - 1] = '\0';
    free(real);
    free(whole);
    return rc;
}

static bool contains(const char *outer, const char *inner)
{
    size_t n = strlen(outer);
    return !strncmp(outer, inner, n) && (!inner[n] || inner[n] == '/' || !strcmp(outer, "/"));
}

static int check_apart(const char *output, const char *other, const char *what,
                       struct perta_err *err)
{
    char *a = NULL, *b = NULL;
    int rc = true_path(output, &a, err);
    if (!rc)
        rc = true_path(other, &b, err);
    if (!rc && (contains(a, b) || contains(b, a)))
        rc = perta_fail(err, PERTA_EUSAGE, "%s: would overwrite, or lie within, %s %s", output,
                        what, other);
    free(a);
    free(b);
    return rc;
}

/* Set the names; the first part of begin and resume. */
static int set_names(struct perta_publish *out, const char *path, const char *like,
                     struct perta_err *err)
{
    *out = (struct perta_publish){.like = like};
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/')
        len--;
    if (!len)
        return perta_fail(err, PERTA_EUSAGE, "an output folder needs a name");
    char *partial;
    out->path = strndup(path, len);
    if (!out->path || asprintf(&partial, "%s" PERTA_PARTIAL_SUFFIX, out->path) < 0)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    out->partial = partial;
    return 0;
}

static int check_partial(const struct perta_publish *out, struct perta_err *err)
{
    struct stat st;
    if (!lstat(out->partial, &st) && !S_ISDIR(st.st_mode))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: exists and is not a folder that a run of perta "
                          "left; move it away, or choose another output",
                          out->partial);
    return perta_owned_check(out->partial, PERTA_OWNED_LEFTOVER, out->like, err);
}

static int check_leftover(const char *path, const char *like, struct perta_err *err)
{
    struct stat st;
    struct perta_publish out;
    int rc = set_names(&out, path, like, err);
    if (!rc && !lstat(out.partial, &st))
        rc = check_partial(&out, err);
    perta_publish_release(&out);
    return rc;
}

/* May the output be written at path? Copies of any input's files may be replaced. */
static int check_place(const char *path, const char *const *inputs, size_t n_inputs, bool force,
                       struct perta_err *err)
{
    bool replace;
    struct perta_err first = {0};
    for (size_t i = 0; i <= n_inputs; i++) {
        struct perta_err why = {0};
        const char *like = i ? inputs[i - 1] : NULL;
        if (i && !like)
            continue;
        int rc = check_target(path, like, force, &replace, &why);
        if (!rc && force)
            rc = check_leftover(path, like, &why);
        if (!rc)
            return 0;
        first = first.code ? first : why;
        if (rc != PERTA_EUSAGE)
            break;
    }
    *err = first;
    return first.code;
}

int perta_publish_check(const char *const *outputs, size_t n_outputs, const char *const *inputs,
                        size_t n_inputs, bool force, struct perta_err *err)
{
    for (size_t o = 0; o < n_outputs; o++) {
        int rc = 0;
        for (size_t i = 0; i < n_inputs && !rc; i++)
            rc = inputs[i] ? check_apart(outputs[o], inputs[i], "the input", err) : 0;
        for (size_t i = 0; i < o && !rc; i++)
            rc = check_apart(outputs[o], outputs[i], "the other output", err);
        if (!rc)
            rc = check_place(outputs[o], inputs, n_inputs, force, err);
        if (rc)
            return rc;
    }
    return 0;
}

static int make_partial(struct perta_publish *out, bool force, struct perta_err *err)
{
    if (!mkdir(out->partial, 0777)) {
        out->made = true;
        return 0;
    }
    if (errno != EEXIST)
        return perta_fail_sys(err, errno, "%s", out->partial);
    int rc = check_partial(out, err);
    if (rc)
        return rc;
    if (!force) {
        err->resumable = true;
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: left by a run that was interrupted or is still "
                          "running; it is not a result. --resume continues it, --force starts "
                          "over",
                          out->partial);
    }
    rc = perta_owned_remove(out->partial, PERTA_OWNED_LEFTOVER, out->like, err);
    if (!rc && mkdir(out->partial, 0777))
        rc = perta_fail_sys(err, errno, "%s", out->partial);
    out->made = !rc;
    return rc;
}

int perta_publish_begin(struct perta_publish *out, const char *path, const char *like, bool force,
                        struct perta_err *err)
{
    int rc = set_names(out, path, like, err);
    if (!rc)
        rc = check_target(out->path, like, force, &out->replace, err);
    if (!rc)
        rc = perta_make_parents(out->path, err);
    return rc ? rc : make_partial(out, force, err);
}

int perta_publish_resume(struct perta_publish *out, const char *path, const char *like, bool force,
                         bool *found, struct perta_err *err)
{
    struct stat st;
    int rc = set_names(out, path, like, err);
    *found = !rc && !lstat(out->partial, &st) && S_ISDIR(st.st_mode);
    out->adopted = out->made = out->keep = *found; /* kept even if this run fails */
    if (*found && (rc = check_partial(out, err)) == PERTA_EUSAGE)
        rc = err->code = PERTA_EINPUT; /* because it is an input of this run, too */
    return rc || !*found ? rc : check_target(out->path, like, force, &out->replace, err);
}

int perta_publish_sweep(const char *path, const char *like, struct perta_err *err)
{
    struct stat st;
    struct perta_publish out;
    int rc = set_names(&out, path, like, err);
    if (!rc && !lstat(out.partial, &st)) {
        rc = check_partial(&out, err);
        if (!rc)
            rc = perta_owned_remove(out.partial, PERTA_OWNED_LEFTOVER, out.like, err);
    }
    perta_publish_release(&out);
    return rc;
}

char *perta_publish_path(const struct perta_publish *out, const char *name)
{
    return perta_path_join(out->partial, name);
}

int perta_publish_clear(const struct perta_publish *out, const char *name, struct perta_err *err)
{
    return out->adopted ? perta_publish_remove(out, name, err) : 0;
}

static int create(const struct perta_publish *out, const char *name, char **path,
                  struct perta_err *err)
{
    int rc = perta_publish_clear(out, name, err);
    if (rc)
        return rc;
    *path = perta_publish_path(out, name);
    if (!*path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    int fd = open(*path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    return fd < 0 ? perta_fail_sys(err, errno, "%s", *path) : fd;
}

static int finish(int fd, const char *path, int rc, struct perta_err *err)
{
    if (!rc && fsync(fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", path);
    close(fd);
    return rc;
}

int perta_publish_file(const struct perta_publish *out, const char *name, const void *data,
                       uint64_t len_bytes, struct perta_err *err)
{
    char *path = NULL;
    int fd = create(out, name, &path, err);
    int rc = fd < 0 ? fd : finish(fd, path, perta_write_all(fd, data, len_bytes, path, err), err);
    free(path);
    return rc;
}

/* Cookie of a stream that writes to a file. */
struct printed {
    int fd, rc;
    const char *path;
    struct perta_err *err;
};

static ssize_t write_printed(void *cookie, const char *data, size_t len_bytes)
{
    struct printed *to = cookie;
    if (!to->rc)
        to->rc = perta_write_all(to->fd, data, len_bytes, to->path, to->err);
    return to->rc ? 0 : (ssize_t)len_bytes;
}

static int print_all(int fd, const char *path, bool (*print)(FILE *to, void *ctx), void *ctx,
                     struct perta_err *err)
{
    struct printed to = {.fd = fd, .path = path, .err = err};
    FILE *file = fopencookie(&to, "w", (cookie_io_functions_t){.write = write_printed});
    if (!file)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    bool printed = print(file, ctx);
    bool closed = !fclose(file);
    return to.rc ? to.rc : printed && closed ? 0 : perta_fail_sys(err, ENOMEM, "%s", path);
}

int perta_publish_print(const struct perta_publish *out, const char *name,
                        bool (*print)(FILE *to, void *ctx), void *ctx, struct perta_err *err)
{
    char *path = NULL;
    int fd = create(out, name, &path, err);
    int rc = fd < 0 ? fd : finish(fd, path, print_all(fd, path, print, ctx, err), err);
    free(path);
    return rc;
}

static int copy_bytes(int from, const char *from_path, int to, const char *to_path,
                      struct perta_err *err)
{
    struct perta_retry retry = {0};
    char buf[65536];
    for (;;) {
        ssize_t got = read(from, buf, sizeof buf);
        if (got < 0 && perta_retry_same(&retry, errno))
            continue;
        retry.n_again = 0;
        if (got < 0)
            return perta_fail_sys(err, errno, "%s", from_path);
        if (!got)
            return 0;
        int rc = perta_write_all(to, buf, (uint64_t)got, to_path, err);
        if (rc)
            return rc;
    }
}

int perta_publish_copy(const struct perta_publish *out, const char *from, const char *name,
                       struct perta_err *err)
{
    int in = perta_open_any(from, O_RDONLY);
    if (in < 0)
        return perta_fail_sys(err, errno, "%s", from);
    char *path = NULL;
    int fd = create(out, name, &path, err);
    int rc = fd < 0 ? fd : finish(fd, path, copy_bytes(in, from, fd, path, err), err);
    free(path);
    close(in);
    return rc;
}

static int write_synced(const char *path, const void *data, uint64_t len_bytes,
                        struct perta_err *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    int rc = finish(fd, path, perta_write_all(fd, data, len_bytes, path, err), err);
    if (rc)
        unlink(path);
    return rc;
}

/* A file that is empty or all zeros was cut off while it was written. */
static bool is_torn(const char *start, uint64_t n)
{
    uint64_t i = 0;
    while (i < n && !start[i])
        i++;
    return i == n;
}

static int check_mark(const char *path, const char *mark, struct perta_err *err)
{
    char start[4097] = "";
    struct stat st;
    if (lstat(path, &st))
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", path);
    if (!S_ISREG(st.st_mode))
        return perta_fail(err, PERTA_EUSAGE, "%s: exists and is not a regular file", path);
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    uint64_t n = (uint64_t)st.st_size < sizeof start - 1 ? (uint64_t)st.st_size : sizeof start - 1;
    int rc = perta_pread_all(fd, start, n, 0, path, err);
    close(fd);
    if (!rc && !strstr(start, mark) && !is_torn(start, n))
        rc = perta_fail(err, PERTA_EUSAGE,
                        "%s: exists, and perta did not write it; --force does "
                        "not replace it; choose another name",
                        path);
    return rc;
}

int perta_publish_check_mark(const char *path, const char *mark, struct perta_err *err)
{
    char *partial = NULL;
    int rc = check_mark(path, mark, err);
    if (!rc && asprintf(&partial, "%s" PERTA_PARTIAL_SUFFIX, path) < 0) {
        partial = NULL;
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    }
    if (!rc)
        rc = check_mark(partial, mark, err);
    free(partial);
    return rc;
}

int perta_publish_single(const char *path, const char *mark, const void *data, uint64_t len_bytes,
                         bool force, struct perta_err *err)
{
    struct stat st;
    char *partial = NULL;
    if (!force && !lstat(path, &st))
        return perta_fail(err, PERTA_EUSAGE, "%s: exists; --force replaces it", path);
    int rc = perta_publish_check_mark(path, mark, err);
    if (!rc && asprintf(&partial, "%s" PERTA_PARTIAL_SUFFIX, path) < 0) {
        partial = NULL;
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    }
    if (!rc) {
        unlink(partial); /* left by a killed run */
        rc = write_synced(partial, data, len_bytes, err);
        if (!rc && rename(partial, path)) {
            rc = perta_fail_sys(err, errno, "%s", path);
            unlink(partial);
        }
    }
    free(partial);
    return rc ? rc : perta_name_sync(path, err);
}

/* Exchange the two folders by three renames: for an instant nothing is at path. */
static int exchange_in_turn(const struct perta_publish *out, struct perta_err *err)
{
    struct stat st;
    char *aside = NULL;
    if (asprintf(&aside, "%s.perta-replaced", out->path) < 0)
        return perta_fail_sys(err, ENOMEM, "%s", out->path);
    int rc = lstat(aside, &st) ? 0 /* else left by a run killed at that instant */
                               : perta_owned_remove(aside, PERTA_OWNED_OUTPUT, out->like, err);
    if (!rc && rename(out->path, aside))
        rc = perta_fail_sys(err, errno, "%s: replace", out->path);
    if (!rc && rename(out->partial, out->path)) {
        rc = perta_fail_sys(err, errno, "%s: replace", out->path);
        rename(aside, out->path);
    } else if (!rc && rename(aside, out->partial)) {
        rc = perta_fail_sys(err, errno, "%s", aside);
    }
    free(aside);
    return rc;
}

/* Exchange the two folders, atomically where the file system can (NFS cannot). */
static int exchange(const struct perta_publish *out, struct perta_err *err)
{
    if (!renameat2(AT_FDCWD, out->partial, AT_FDCWD, out->path, RENAME_EXCHANGE))
        return 0;
    return errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP
               ? exchange_in_turn(out, err)
               : perta_fail_sys(err, errno, "%s: replace", out->path);
}

/* Something came into the way while the run worked. Its work is complete, so it is kept for
 * --resume: the error is the system's, not the user's. */
static int as_system_error(struct perta_err *err)
{
    if (err->code == PERTA_EUSAGE)
        err->code = PERTA_ESYS;
    return err->code;
}

/* Replace the folder at path. The old one is checked again once it has left that name, and only
 * then removed. */
static int replace(struct perta_publish *out, struct perta_err *err)
{
    if (exchange(out, err))
        return as_system_error(err);
    if (perta_owned_check(out->partial, PERTA_OWNED_OUTPUT, out->path, err)) {
        struct perta_err ignored = {0};
        if (exchange(out, &ignored)) {
            out->made = false; /* it is not ours to remove */
            perta_err_context(err, "%s: was at %s before, and changed while the new one was made",
                              out->partial, out->path);
        } else if (perta_owned_check(out->path, PERTA_OWNED_OUTPUT, out->partial, &ignored)) {
            ignored.code = err->code; /* the same error, with the name that it has again */
            *err = ignored;
            perta_err_context(err, "%s: changed, so it is left as it is", out->path);
        }
        return as_system_error(err);
    }
    out->made = false;
    int rc = perta_name_sync(out->path, err);
    return rc ? rc : perta_owned_remove(out->partial, PERTA_OWNED_OUTPUT, out->path, err);
}

int perta_publish_remove(const struct perta_publish *out, const char *name, struct perta_err *err)
{
    char *path = perta_publish_path(out, name);
    int rc = path ? 0 : perta_fail_sys(err, ENOMEM, "%s", name);
    if (!rc && remove_tree(path) && errno != ENOENT)
        rc = perta_fail_sys(err, errno, "%s", path);
    free(path);
    return rc;
}

int perta_publish_sync(const struct perta_publish *out, struct perta_err *err)
{
    int rc = perta_folder_sync(out->partial, err);
    return rc ? rc : perta_name_sync(out->partial, err);
}

int perta_publish_commit(struct perta_publish *out, struct perta_err *err)
{
    if (!out->made)
        return 0;
    int rc = perta_folder_sync(out->partial, err);
    if (rc)
        return rc;
    if (out->replace)
        return replace(out, err);
    if (rename(out->partial, out->path))
        return perta_fail_sys(err, errno, "%s", out->path);
    out->made = false;
    return perta_name_sync(out->path, err);
}

int perta_publish_discard(struct perta_publish *out, struct perta_err *err)
{
    if (out->made && remove_tree(out->partial) && errno != ENOENT)
        return perta_fail_sys(err, errno, "%s: remove", out->partial);
    out->made = false;
    return 0;
}

void perta_publish_release(struct perta_publish *out)
{
    if (out->made && !out->keep)
        remove_tree(out->partial);
    free(out->path);
    free(out->partial);
    *out = (struct perta_publish){0};
}
