#include "tools/external.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* PERTA_HELPERS (meson.build): where `make install' puts such programs; absolute, or relative to
 * the command's folder. */
#define PREFIX "perta-"
enum { NAME_MAX_CHARS = 64 };

/* What a verb may be called: it becomes a part of a file's name. */
static bool is_name(const char *name)
{
    size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-");
    return n && n <= NAME_MAX_CHARS && !name[n] && *name != '-';
}

/* The path of the running program; empty if it is not known. path holds PATH_MAX bytes. */
static void find_self(char *path)
{
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = '\0';
}

/* The folders to search, in order, as in PATH. NULL when out of memory. The caller frees it. */
static char *folders(void)
{
    char self[PATH_MAX], *list = NULL;
    const char *path = getenv("PATH");
    find_self(self);
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = '\0';
    bool absolute = *PERTA_HELPERS == '/';
    int n = asprintf(&list, "%s:%s:%s%s%s", self, path ? path : "", absolute ? "" : self,
                     absolute ? "" : "/", PERTA_HELPERS);
    return n < 0 ? NULL : list;
}

/* Try each folder; errno is why the last program that is there could not be run, or ENOENT. */
static void run_from(char *list, const char *name, char **argv)
{
    int why = ENOENT;
    for (char *rest = list, *folder; (folder = strsep(&rest, ":"));) {
        char *file = NULL;
        if (!*folder) /* in PATH this would be the working folder */
            continue;
        if (asprintf(&file, "%s/" PREFIX "%s", folder, name) < 0) {
            why = ENOMEM;
            break;
        }
        argv[0] = file;
        execv(file, argv);
        int error = errno;
        /* A folder of PATH that cannot be searched does not show whether the program is there. */
        if (error != ENOENT && error != ENOTDIR && !access(file, F_OK))
            why = error;
        free(file);
    }
    errno = why;
}

int external_run(const char *name, int argc, char **argv)
{
    char self[PATH_MAX];
    char *list = is_name(name) ? folders() : NULL;
    char **words = calloc((size_t)argc + 1, sizeof *words);
    errno = list || !is_name(name) ? ENOENT : ENOMEM;
    find_self(self);
    if (list && words && (!*self || !setenv("PERTA", self, 1))) {
        for (int i = 1; i < argc; i++)
            words[i] = argv[i];
        run_from(list, name, words);
    }
    int why = words ? errno : ENOMEM;
    free(words);
    free(list);
    if (why != ENOENT) {
        fprintf(stderr, "perta: " PREFIX "%s: %s\n", name, strerror(why));
        return 4;
    }
    fprintf(stderr, "perta: unknown verb %s\n", name);
    if (is_name(name))
        fprintf(stderr, "perta: there is no program " PREFIX "%s on PATH either\n", name);
    return 2;
}

struct names {
    char (*items)[NAME_MAX_CHARS + 1];
    size_t n;
};

static int compare(const void *a, const void *b)
{
    return strcmp(a, b);
}

static bool is_program(int folder, const char *file)
{
    struct stat st;
    return folder >= 0 && !faccessat(folder, file, X_OK, 0) && !fstatat(folder, file, &st, 0) &&
           S_ISREG(st.st_mode);
}

/* Add the programs of a folder. What cannot be read or remembered is not listed. */
static void add_folder(struct names *names, const char *folder, bool (*is_verb)(const char *name))
{
    DIR *dir = *folder ? opendir(folder) : NULL;
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        const char *file = entry->d_name, *name = file + strlen(PREFIX);
        if (strncmp(file, PREFIX, strlen(PREFIX)) || !is_name(name) || is_verb(name) ||
            !is_program(dirfd(dir), file))
            continue;
        void *grown = realloc(names->items, (names->n + 1) * sizeof *names->items);
        if (!grown)
            break;
        names->items = grown;
        strcpy(names->items[names->n++], name);
    }
    if (dir)
        closedir(dir);
}

void external_list(FILE *to, bool (*is_verb)(const char *name))
{
    struct names names = {0};
    char *list = folders();
    for (char *rest = list, *folder; rest && (folder = strsep(&rest, ":"));)
        add_folder(&names, folder, is_verb);
    if (names.n) {
        qsort(names.items, names.n, sizeof *names.items, compare);
        fprintf(to, "\nVerbs that are programs of their own (perta-VERB, on PATH):\n ");
        for (size_t i = 0; i < names.n; i++)
            if (!i || strcmp(names.items[i], names.items[i - 1]))
                fprintf(to, " %s", names.items[i]);
        fputc('\n', to);
    }
    free(names.items);
    free(list);
}
