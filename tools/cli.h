/* cli.h - what all verbs of the command share: options, progress, results, errors. */
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
    bool statement; /* beside each patch, about how it was made */
    enum progress_style progress;
    double started, last_drawn; /* seconds */
    bool drew;
};

/* Child parsers: options that every verb takes, those of verbs that write a folder, and these with
 * those of verbs that write patches. Their input is the struct cli. */
extern const struct argp cli_common_argp;
extern const struct argp cli_writing_argp;
extern const struct argp cli_patching_argp;

/* Keys of long-only options start here, for every verb's own. */
#define CLI_KEY_OWN 0x200

/* Parse a verb's arguments; argp_state->input is input. Exits with 2 on a usage error. */
void cli_parse(struct cli *cli, const struct argp *argp, int argc, char **argv, void *input);

/* What arguments say; argp_error (exit 2) when it makes no sense. option is for messages. */
double cli_number(struct argp_state *state, const char *option, const char *text);
uint64_t cli_count(struct argp_state *state, const char *option, const char *text);
/* Which of names (NULL after the last) text is. */
int cli_choice(struct argp_state *state, const char *option, const char *text,
               const char *const *names);
enum perta_compute cli_compute(struct argp_state *state, const char *text);
/* --stat mean,meansq: which of them. */
void cli_stats(struct argp_state *state, const char *text, bool *mean, bool *meansq);
/* For a parser's other keys, of verbs with one argument: takes it. missing says what was to be
 * there. */
error_t cli_one_argument(int key, char *arg, struct argp_state *state, const char **argument,
                         const char *missing);

/* Seconds since the verb started. */
double cli_seconds(const struct cli *cli);
/* "1.25 GB", in powers of ten; buf holds at least 32 bytes. */
const char *cli_bytes(double bytes, char *buf);

/* With --statement: write PATCH.intoto.json about the patch at path, which was just made. summary
 * says when that was begun, and may say by what it was read. tools/statement.c */
int cli_statement(const struct cli *cli, const char *path, const json_t *summary,
                  struct perta_err *err);

/* Before the work: could that be written? Not over what is no statement. */
int cli_statement_check(const struct cli *cli, const char *patch, struct perta_err *err);

/* Print results: with --json the object, else nothing. Takes the reference. Without memory (summary
 * may be NULL) nothing is printed, and cli_status says so. */
void cli_json(const struct cli *cli, json_t *summary);
/* JSON in a line; the caller's (free). NULL without memory, and then cli_status says so. */
char *cli_text(const json_t *json);
/* Files of the model that did not go with it, which the result names. */
void cli_say_left_behind(const struct cli *cli, const json_t *result);
/* On standard error: the keys of config.json that are passed over, which the result names
 * ("unknown_config_keys"). Nothing with --quiet. */
void cli_note_unknown_keys(const struct cli *cli, const json_t *result);
/* The summary's "notes", to stderr: what a user ought to know; nothing with --quiet. */
void cli_notes(const struct cli *cli, const json_t *summary);
/* A line of the result for people; nothing with --json or --quiet. Without memory cli_status says
 * so. */
void cli_say(const struct cli *cli, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* At exit: what was printed must have arrived, of --help and --version too; else exit with 4. */
void cli_check_stdout(void);
/* Print the error and give the exit status for it. 0 stays 0. */
int cli_status(const struct cli *cli, int rc, const struct perta_err *err);

/* Can this build compute with models? If not, the verbs that must say so (no_model.c). */
extern const bool cli_has_model;

int cmd_inspect(int argc, char **argv);
int cmd_estimate(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_accumulate(int argc, char **argv);
int cmd_unlearn(int argc, char **argv);
int cmd_diff(int argc, char **argv);
int cmd_apply(int argc, char **argv);
int cmd_revert(int argc, char **argv);
int cmd_compose(int argc, char **argv);
int cmd_manifest(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_report(int argc, char **argv);
int cmd_demo(int argc, char **argv);

#endif
