#include "estimators/passes/eval.h"
#include "tools/cli.h"

enum {
    KEY_MODEL = CLI_KEY_OWN,
    KEY_DRY_RUN,
    KEY_PATCH,
    KEY_ADAPTER,
    KEY_QUANTIZE,
    KEY_DATA,
    KEY_MAX_TOKENS,
    KEY_COMPUTE,
    KEY_SCRATCH,
    KEY_PER_SAMPLE,
    KEY_GENERATE,
    KEY_GRADIENT_NORM
};

struct args {
    struct cli cli; /* must be first: it is the input of the child parsers */
    struct perta_eval eval;
};

static const struct argp_option options[] = {
    {"dry-run", KEY_DRY_RUN, NULL, 0, "Check everything, but read only headers and data", 2},
    {"model", KEY_MODEL, "DIR", 0, "The model (perta help families)", 1},
    {"patch", KEY_PATCH, "DIR", 0, "Apply this patch while the model is read; nothing is written",
     1},
    {"adapter", KEY_ADAPTER, "DIR", 0, "Use the model with this PEFT LoRA adapter", 1},
    {"quantize", KEY_QUANTIZE, CLI_ROUNDINGS, 0,
     "Round the layers' weights to this format and back while they are read, after --patch", 1},
    {"data", KEY_DATA, "FILE", 0,
     "The questions: JSON lines with \"input_ids\" and \"labels\", and with other answers to "
     "the same question as \"paraphrased\" and \"perturbed\"",
     1},
    {"per-sample", KEY_PER_SAMPLE, NULL, 0, "Also print the numbers of every line", 2},
    {"generate", KEY_GENERATE, "N", 0,
     "Also continue each line's tokens before its first label by at most N tokens, each the most "
     "probable one; the result has the numbers and token ids of every line",
     2},
    {"gradient-norm", KEY_GRADIENT_NORM, NULL, 0,
     "Also compute the norm of the gradient of each line's loss, in a forward and a backward pass "
     "of its own",
     2},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "Refuse samples of more than N tokens", 2},
    {"compute", KEY_COMPUTE, "auto|f32|bf16", 0,
     "Matrix products in bfloat16 with float32 sums, or in float32 (auto: bf16 if the CPU "
     "supports it)",
     2},
    {"scratch", KEY_SCRATCH, "DIR", 0,
     "Folder for data that does not fit in memory (default: $TMPDIR, or /var/tmp)", 2},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    struct perta_eval *e = &args->eval;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &args->cli;
        return 0;
    case KEY_DRY_RUN:
        args->cli.run.dry_run = true;
        return 0;
    case KEY_MODEL:
        e->model = arg;
        return 0;
    case KEY_PATCH:
        e->patch = arg;
        return 0;
    case KEY_ADAPTER:
        e->adapter = arg;
        return 0;
    case KEY_QUANTIZE:
        e->quantize = cli_rounding(state, arg);
        return 0;
    case KEY_DATA:
        e->data = arg;
        return 0;
    case KEY_MAX_TOKENS:
        e->max_tokens = cli_count(state, "--max-tokens", arg);
        return 0;
    case KEY_PER_SAMPLE:
        e->per_sample = true;
        return 0;
    case KEY_GENERATE:
        e->generate = cli_count(state, "--generate", arg);
        if (!e->generate)
            argp_error(state, "--generate: at least 1");
        return 0;
    case KEY_GRADIENT_NORM:
        e->gradient_norm = true;
        return 0;
    case KEY_COMPUTE:
        e->compute = cli_compute(state, arg);
        return 0;
    case KEY_SCRATCH:
        e->scratch = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    NULL,
    "Measure how well a model knows answers: their loss and probability, and whether it would give "
    "them; of the model as it is, with a patch applied, or with a LoRA adapter. The model is read "
    "block by block and need not fit in memory."
    "\v"
    "With --per-sample the numbers of every line are printed too (with --json under "
    "\"per_sample\"). `perta tokenize' makes the data from text; docs/eval.md defines "
    "the numbers.\n\n"
    "Example:\n"
    "  perta eval --model full --patch patches/alpha-1 --data forget.jsonl",
    children,
    NULL,
    NULL};

static double number(const json_t *summary, const char *key)
{
    return json_number_value(json_object_get(summary, key));
}

/* "-" where there is none. */
static const char *number_if_any(const json_t *of, const char *key, const char *format,
                                 char text[32])
{
    snprintf(text, 32, json_is_number(json_object_get(of, key)) ? format : "-", number(of, key));
    return text;
}

static void say_lines(const struct cli *cli, const json_t *list)
{
    size_t i;
    json_t *item;
    char text[32];
    bool norms = json_object_get(json_array_get(list, 0), "gradient_norm");
    if (list)
        cli_say(cli,
                "   line  labels        loss  probability  accuracy  extraction"
                "   min-k  min-k++%s\n",
                norms ? "  gradient norm" : "");
    json_array_foreach (list, i, item) {
        cli_say(cli, "%7.0f %7.0f %11.6f  %11.6f  %8.4f  %10.4f %7.3f  %7.3f", number(item, "line"),
                number(item, "labels"), number(item, "loss"), number(item, "probability"),
                number(item, "accuracy"), number(item, "extraction_strength"),
                number(item, "min_k"), number(item, "min_k_plus_plus"));
        if (norms)
            cli_say(cli, "  %13s", number_if_any(item, "gradient_norm", "%.6g", text));
        cli_say(cli, "%s\n", json_is_true(json_object_get(item, "exact_match")) ? "  exact" : "");
    }
}

static void say_generated(const struct cli *cli, const json_t *list)
{
    size_t i, k;
    json_t *item, *id;
    json_array_foreach (list, i, item) {
        const json_t *ids = json_object_get(item, "generated_ids");
        if (!ids)
            continue;
        cli_say(cli, "line %.0f generates:", number(item, "line"));
        json_array_foreach (ids, k, id)
            cli_say(cli, " %lld", (long long)json_integer_value(id));
        cli_say(cli, "%s\n",
                json_is_true(json_object_get(item, "generated_end")) ? " (end)" : " ...");
    }
}

static void say(const struct cli *cli, const json_t *summary)
{
    char text[32];
    if (cli->run.dry_run) {
        cli_say(cli, "dry run: all checks passed; only headers and data were read\n");
        return;
    }
    say_lines(cli, json_object_get(summary, "per_sample"));
    say_generated(cli, json_object_get(summary, "per_sample"));
    cli_say_rounded(cli, summary);
    cli_say(cli, "loss           %.6f over %.0f samples\n", number(summary, "loss"),
            number(summary, "samples"));
    cli_say(cli, "probability    %.6f\n", number(summary, "probability"));
    cli_say(cli, "exact match    %.6f (of labels: %.6f)\n", number(summary, "exact_match"),
            number(summary, "accuracy"));
    cli_say(cli, "memorization   %s (extraction strength: %.6f)\n",
            number_if_any(summary, "exact_memorization", "%.6f", text),
            number(summary, "extraction_strength"));
    cli_say(cli, "min-k          %.6f (min-k++: %.6f)\n", number(summary, "min_k"),
            number(summary, "min_k_plus_plus"));
    if (json_object_get(summary, "gradient_norm"))
        cli_say(cli, "gradient norm  %.6g\n", number(summary, "gradient_norm"));
    if (!json_object_get(summary, "truth_ratio"))
        return;
    cli_say(cli, "truth ratio    %.6f (as a score: forget %.6f, retain %.6f)\n",
            number(summary, "truth_ratio"), number(summary, "truth_ratio_forget"),
            number(summary, "truth_ratio_retain"));
    cli_say(cli, "choice         %.6f (probability among the answers given)\n",
            number(summary, "choice_probability"));
}

int cmd_eval(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = perta_eval(&args.eval, &args.cli.run, &summary, &err);
    if (!rc) {
        cli_note_unknown_keys(&args.cli, summary);
        cli_notes(&args.cli, summary);
        say(&args.cli, summary);
        perta_json_set(&summary, "seconds", json_real(cli_seconds(&args.cli)));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}
