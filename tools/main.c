/* perta - make a language model forget, out of core. */
#include <malloc.h>
#include <stdio.h>
#include <string.h>

#include "tools/cli.h"

static const struct verb {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *what;
} verbs[] = {
    {"inspect", cmd_inspect, "what is in a checkpoint, an importance folder or a patch"},
    {"estimate", cmd_estimate, "importance from a model and text"},
    {"eval", cmd_eval, "how well a model knows answers, with a patch or without"},
    {"accumulate", cmd_accumulate, "importance from gradient dumps"},
    {"unlearn", cmd_unlearn, "subtract the weighed task vector: a patch, and a model"},
    {"diff", cmd_diff, "a patch between any two checkpoints"},
    {"apply", cmd_apply, "the model that a patch leads to"},
    {"revert", cmd_revert, "the model that a patch was made from"},
    {"compose", cmd_compose, "patches made one after another, as one"},
    {"manifest", cmd_manifest, "digests of a folder, down to the tensor"},
    {"verify", cmd_verify, "check a folder or a patch against its digests"},
    {"report", cmd_report, "a page about a patch, for people"},
    {"demo", cmd_demo, "the whole story, on a model that it trains itself"},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void usage(FILE *to)
{
    fprintf(to, "Usage: perta VERB [OPTION...] ...\n"
                "Make a language model forget: per-parameter task arithmetic, out of core.\n\n");
    for (int i = 0; i < N_VERBS; i++)
        fprintf(to, "  %-11s %s\n", verbs[i].name, verbs[i].what);
    fprintf(to, "\n`perta VERB --help' explains a verb and gives an example.\n"
                "Exit status: 0 done, 1 a check failed, 2 usage, 3 bad input, 4 system (I/O,\n"
                "memory), 130 interrupted.\n");
}

int main(int argc, char **argv)
{
    mallopt(M_ARENA_MAX, 1); /* workers allocate nothing; arenas would take address space */
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
