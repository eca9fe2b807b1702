/* perta - make a language model forget, out of core. */
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/cli.h"

static const struct verb {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *what;
    enum { NEVER, WITH_STEPS, ALWAYS } computes; /* matrix products */
} verbs[] = {
    {"inspect", cmd_inspect, "what is in a checkpoint, an importance folder or a patch", NEVER},
    {"estimate", cmd_estimate, "importance from a model and text", ALWAYS},
    {"eval", cmd_eval, "how well a model knows answers, with a patch or without", ALWAYS},
    {"accumulate", cmd_accumulate, "importance from gradient dumps", NEVER},
    {"unlearn", cmd_unlearn, "subtract the weighed task vector: a patch, and a model", WITH_STEPS},
    {"diff", cmd_diff, "a patch between any two checkpoints", NEVER},
    {"apply", cmd_apply, "the model that a patch leads to", NEVER},
    {"revert", cmd_revert, "the model that a patch was made from", NEVER},
    {"compose", cmd_compose, "patches made one after another, as one", NEVER},
    {"manifest", cmd_manifest, "digests of a folder, down to the tensor", NEVER},
    {"verify", cmd_verify, "check a folder or a patch against its digests", NEVER},
    {"report", cmd_report, "a page about a patch, for people", NEVER},
    {"demo", cmd_demo, "the whole story, on a model that it trains itself", ALWAYS},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static const char *lack_of(const struct verb *verb)
{
    return cli_has_model || verb->computes == NEVER ? ""
           : verb->computes == WITH_STEPS           ? " (this build: without --steps)"
                                                    : " (not in this build)";
}

static void usage(FILE *to)
{
    fprintf(to, "Usage: perta VERB [OPTION...] ...\n"
                "Make a language model forget: per-parameter task arithmetic, out of core.\n\n");
    for (int i = 0; i < N_VERBS; i++)
        fprintf(to, "  %-11s %s%s\n", verbs[i].name, verbs[i].what, lack_of(&verbs[i]));
    fprintf(to, "\n`perta VERB --help' explains a verb and gives an example.\n"
                "Exit status: 0 done, 1 a check failed, 2 usage, 3 bad input, 4 system (I/O,\n"
                "memory), 130 interrupted.\n");
}

/* Or a file that is opened would get the number of a stream that was closed, and what is printed.
 * Writes to what is opened to read fail. */
static void hold_streams(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd)
            _exit(4);
}

int main(int argc, char **argv)
{
    /* One arena, for each takes address space; and of fixed ways, for glibc's own keep ever larger
     * blocks once one was freed: --memory has no room for what is kept. */
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_TRIM_THRESHOLD, 4 << 20);
    hold_streams();
    atexit(cli_check_stdout);
    const char *name = argc > 1 ? argv[1] : "";
    for (int i = 0; i < N_VERBS; i++)
        if (!strcmp(name, verbs[i].name))
            return verbs[i].run(argc - 1, argv + 1);
    if (!strcmp(name, "--version")) {
        puts("perta " PERTA_VERSION);
        return 0;
    }
    bool asked = !strcmp(name, "--help") || !strcmp(name, "help");
    if (*name && !asked)
        fprintf(stderr, "perta: no verb %s\n", name);
    usage(asked ? stdout : stderr);
    return asked ? 0 : 2;
}
