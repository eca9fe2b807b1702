/* perta dequantize: a checkpoint of FP8 or MXFP4 weights as one of BF16. */
#include "stream/patch/dequantize.h"
#include "tools/cli.h"

enum { KEY_OUT = CLI_KEY_OWN };

struct args {
    struct cli cli;
    struct perta_dequantize dequantize;
};

static const struct argp_option options[] = {{"out", KEY_OUT, "DIR", 0, "Write the model here", 1},
                                             {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_OUT:
        args->dequantize.out = arg;
        return 0;
    case ARGP_KEY_END:
        if (!args->dequantize.out)
            argp_error(state, "--out DIR is missing");
        return 0;
    default:
        return cli_one_argument(key, arg, state, &args->dequantize.model,
                                "give the folder of a model");
    }
}

static const struct argp_child children[] = {
    {&cli_writing_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};

static const struct argp argp = {
    options,
    parse,
    "MODEL",
    "Write MODEL, whose weights are FP8 (DeepSeek's blocks, fbgemm_fp8, compressed-tensors) or "
    "MXFP4 (GptOss), with the BF16 weights that transformers dequantises them to (F16 or F32 where "
    "config.json says so), so that it can be edited. Scales and quantization_config are gone; the "
    "other files are copied."
    "\v"
    "Example:\n"
    "  perta dequantize gpt-oss-20b --out gpt-oss-20b-bf16",
    children,
    NULL,
    NULL};

static double number(const json_t *summary, const char *key)
{
    return json_number_value(json_object_get(summary, key));
}

static void say(const struct args *args, const json_t *summary, double seconds)
{
    const struct cli *cli = &args->cli;
    const char *dtype = json_string_value(json_object_get(summary, "dtype"));
    char a[32], b[32];
    if (cli->run.dry_run)
        cli_say(cli,
                "dry run: %.0f tensors would be dequantised to %s, %s written; nothing was "
                "written\n",
                number(summary, "dequantised"), dtype,
                cli_bytes(number(summary, "model_bytes"), a));
    else
        cli_say(cli, "%s: %s, %.0f tensors, of which %.0f were dequantised to %s\n",
                args->dequantize.out, cli_bytes(number(summary, "written_bytes"), a),
                number(summary, "tensors"), number(summary, "dequantised"), dtype);
    if (number(summary, "dropped") > 0)
        cli_say(cli, "  left out: %.0f scales of activations and of the KV cache\n",
                number(summary, "dropped"));
    if (!cli->run.dry_run)
        cli_say(cli, "%.2f s (%s/s)\n", seconds,
                cli_bytes(number(summary, "written_bytes") / seconds, b));
    cli_say_left_behind(cli, summary);
}

int cmd_dequantize(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.dequantize.force = args.cli.force;
    int rc = perta_dequantize(&args.dequantize, &args.cli.run, &summary, &err);
    if (!rc) {
        double t = cli_seconds(&args.cli);
        say(&args, summary, t);
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}
