/* perta - make a language model forget, out of core. */
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "estimators/model/family.h"
#include "estimators/model/wrapper.h"
#include "tools/cli.h"
#include "tools/external.h"

static const struct verb {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *what;
    enum { NEVER, WITH_STEPS, ALWAYS } computes; /* whether the verb needs matrix products */
} verbs[] = {
    {"inspect", cmd_inspect, "show what is in a checkpoint, an importance folder or a patch",
     NEVER},
    {"estimate", cmd_estimate, "compute importance from a model and text", ALWAYS},
    {"eval", cmd_eval, "measure how well a model knows answers, with or without a patch", ALWAYS},
    {"tune", cmd_tune, "train a LoRA adapter on text, by streaming the model", ALWAYS},
    {"accumulate", cmd_accumulate, "compute importance from gradient dumps", NEVER},
    {"unlearn", cmd_unlearn, "subtract the weighted task vector: writes a patch, and a model",
     WITH_STEPS},
    {"diff", cmd_diff, "write the patch between any two checkpoints", NEVER},
    {"apply", cmd_apply, "write the model that a patch leads to", NEVER},
    {"revert", cmd_revert, "write the model that a patch was made from", NEVER},
    {"compose", cmd_compose, "combine patches made one after another into one", NEVER},
    {"dequantize", cmd_dequantize, "write a model of FP8 or MXFP4 weights as BF16", NEVER},
    {"manifest", cmd_manifest, "print the digests of a folder, down to the tensor", NEVER},
    {"verify", cmd_verify, "check a folder or a patch against its digests", NEVER},
    {"report", cmd_report, "write a web page about a patch", NEVER},
    {"demo", cmd_demo, "run all of it on small models that it trains itself", ALWAYS},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static const char *lack_of(const struct verb *verb)
{
    return cli_has_model || verb->computes == NEVER ? ""
           : verb->computes == WITH_STEPS           ? " (this build: without --steps)"
                                                    : " (not in this build)";
}

static const struct verb *verb_of(const char *name)
{
    for (int i = 0; i < N_VERBS; i++)
        if (!strcmp(name, verbs[i].name))
            return &verbs[i];
    return NULL;
}

static bool is_verb(const char *name)
{
    return verb_of(name) != NULL;
}

static void usage(FILE *to)
{
    fprintf(to, "Usage: perta VERB [OPTION...] ...\n"
                "Make a language model forget: per-parameter task arithmetic, out of core.\n\n");
    for (int i = 0; i < N_VERBS; i++)
        fprintf(to, "  %-11s %s%s\n", verbs[i].name, verbs[i].what, lack_of(&verbs[i]));
    external_list(to, is_verb);
    fprintf(to,
            "\n`perta VERB --help' explains a verb and its options, with an example.\n"
            "`perta help families' lists the models that estimate, eval and tune compute with.\n"
            "Exit status: 0 done, 1 a check failed, 2 usage, 3 bad input, 4 system (I/O,\n"
            "memory), 130 interrupted.\n");
}

static void list_family(const char *model_type, const char *architecture)
{
    printf("%-24s %s\n", model_type, architecture);
}

/* As `config.json' names them; models around a language model come last. */
static void list_families(void)
{
    for (size_t i = 0; i < perta_n_families; i++) {
        const struct perta_family *family = perta_families[i];
        list_family(family->model_type, family->architecture);
        if (family->other_type)
            list_family(family->other_type, family->architecture);
    }
    for (size_t i = 0; i < perta_n_wrappers; i++)
        list_family(perta_wrappers[i].model_type, perta_wrappers[i].architecture);
}

/* Open the standard streams that are closed: otherwise the first file that is opened would get the
 * number of a stream, and printed text would go into it. /dev/null is opened read-only, so that
 * writes to it fail. */
static void open_standard_streams(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd)
            _exit(4);
}

int main(int argc, char **argv)
{
    /* One arena, because each reserves address space; and fixed thresholds, because glibc's own
     * grow with every block that is freed, so that it retains ever larger blocks: --memory has no
     * room for those. */
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_TRIM_THRESHOLD, 4 << 20);
    open_standard_streams();
    atexit(cli_check_stdout);
    const char *name = argc > 1 ? argv[1] : "";
    const struct verb *verb = verb_of(name);
    if (verb)
        return verb->run(argc - 1, argv + 1);
    if (!strcmp(name, "--version")) {
        puts("perta " PERTA_VERSION);
        return 0;
    }
    if (argc == 3 && !strcmp(name, "help") && !strcmp(argv[2], "families")) {
        list_families();
        return 0;
    }
    bool asked = !strcmp(name, "--help") || !strcmp(name, "help");
    int rc = *name && !asked ? external_run(name, argc - 1, argv + 1) : 2;
    if (rc == 2)
        usage(asked ? stdout : stderr);
    return asked ? 0 : rc;
}
