/* cli.h - what all verbs of the command share: options, progress, results and errors. */
#ifndef PERTA_TOOLS_CLI_H
#define PERTA_TOOLS_CLI_H

#include <argp.h>
#include <jansson.h>
#include <stdbool.h>

#include "estimators/passes/estimate.h"
#include "io/text.h"
#include "stream/stream.h"

enum progress_style { PROGRESS_AUTO, PROGRESS_BAR, PROGRESS_PLAIN, PROGRESS_JSON, PROGRESS_NONE };

struct cli {
    const char *verb;
    struct perta_run run;
    bool json, quiet, force;
    bool statement; /* also write a statement of how each patch was made */
    enum progress_style progress;
    double started, last_drawn; /* in seconds */
    bool drew;
};

/* Child parsers: the options that every verb takes; those of verbs that write a folder; and those
 * of verbs that write patches, which include the second. Their input is the struct cli. */
extern const struct argp cli_common_argp;
extern const struct argp cli_writing_argp;
extern const struct argp cli_patching_argp;

/* First key for the options of a verb's own that have no short form. */
#define CLI_KEY_OWN 0x200

/* Parse the arguments of a verb. input becomes argp_state->input. Exits with status 2 on a usage
 * error. */
void cli_parse(struct cli *cli, const struct argp *argp, int argc, char **argv, void *input);

/* Parse the value of an option. They call argp_error (exit status 2) if it is not valid; option is
 * its name for the message. */
double cli_number(struct argp_state *state, const char *option, const char *text);
uint64_t cli_count(struct argp_state *state, const char *option, const char *text);
/* The index of text in names, which ends with NULL. */
int cli_choice(struct argp_state *state, const char *option, const char *text,
               const char *const *names);
enum perta_compute cli_compute(struct argp_state *state, const char *text);
/* --quantize; its argument in the help is CLI_ROUNDINGS. */
#define CLI_ROUNDINGS "nf4|int8|int4|q4_0|fp8"
enum perta_rounding cli_rounding(struct argp_state *state, const char *text);
/* Print from the result in which format weights were rounded, if they were. */
void cli_say_rounded(const struct cli *cli, const json_t *result);
/* Parse --stat mean,meansq: sets which of the two are wanted. */
void cli_stats(struct argp_state *state, const char *text, bool *mean, bool *meansq);
/* Handle the remaining keys of a verb that takes exactly one argument. missing is the message if
 * there is none. */
error_t cli_one_argument(int key, char *arg, struct argp_state *state, const char **argument,
                         const char *missing);

/* Seconds since the verb began. */
double cli_seconds(const struct cli *cli);
/* Format as "1.25 GB", in powers of ten. buf holds at least 32 bytes. */
const char *cli_bytes(double bytes, char *buf);

/* With --statement, write PATCH.intoto.json about the patch at path, which has just been made.
 * summary says when the run began and, if it has one, which engine read the inputs.
 * (tools/statement.c) */
int cli_statement(const struct cli *cli, const char *path, const json_t *summary,
                  struct perta_err *err);

/* Call before the work: checks that the statement can be written, and does not replace a file that
 * is not a statement. */
int cli_statement_check(const struct cli *cli, const char *patch, struct perta_err *err);

/* With --json, print summary as one object. Takes the reference. If memory runs out (summary may be
 * NULL) nothing is printed, and cli_status() reports it. */
void cli_json(const struct cli *cli, json_t *summary);
/* JSON on one line; the caller frees it. NULL when out of memory, and then cli_status() reports
 * it. */
char *cli_text(const json_t *json);
/* Print which files of the model were not copied, from the result. */
void cli_say_left_behind(const struct cli *cli, const json_t *result);
/* Print to standard error which keys of config.json are ignored, from "unknown_config_keys" of the
 * result. Prints nothing with --quiet. */
void cli_note_unknown_keys(const struct cli *cli, const json_t *result);
/* Print the summary's "notes", which warn the user, to standard error. Prints nothing with
 * --quiet. */
void cli_notes(const struct cli *cli, const json_t *summary);
/* Print a line of the result as text. Prints nothing with --json or --quiet. If memory runs out,
 * cli_status() reports it. */
void cli_say(const struct cli *cli, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Runs at exit, also after --help and --version: exits with status 4 if standard output could not
 * be written. */
void cli_check_stdout(void);
/* Print the error, and return the exit status for it; 0 if rc is 0. */
int cli_status(const struct cli *cli, int rc, const struct perta_err *err);

/* False in a build without matrix products; then no_model.c replaces the verbs that need them. */
extern const bool cli_has_model;
/* Whether estimate, eval and tune accept the checkpoint at path, by what they read before its
 * weights: 0, or the error that they end with. */
int cli_check_model(const char *path, struct perta_err *err);

int cmd_inspect(int argc, char **argv);
int cmd_estimate(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_tune(int argc, char **argv);
int cmd_accumulate(int argc, char **argv);
int cmd_unlearn(int argc, char **argv);
int cmd_diff(int argc, char **argv);
int cmd_apply(int argc, char **argv);
int cmd_revert(int argc, char **argv);
int cmd_compose(int argc, char **argv);
int cmd_dequantize(int argc, char **argv);
int cmd_manifest(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_report(int argc, char **argv);
int cmd_demo(int argc, char **argv);

#endif
