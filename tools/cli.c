#include "tools/cli.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "io/text.h"

enum {
    KEY_MEMORY = 0x100,
    KEY_THREADS,
    KEY_IO,
    KEY_JSON,
    KEY_PROGRESS,
    KEY_FORCE,
    KEY_DRY_RUN,
    KEY_RESUME,
    KEY_STATEMENT
};

static volatile sig_atomic_t cancelled;

static void on_signal(int signal)
{
    (void)signal;
    cancelled = 1;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double cli_seconds(const struct cli *cli)
{
    return now() - cli->started;
}

const char *cli_bytes(double bytes, char *buf)
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    int i = 0;
    for (; bytes >= 1000 && i < 5; i++)
        bytes /= 1000;
    snprintf(buf, 32, i ? "%.2f %s" : "%.0f %s", bytes, units[i]);
    return buf;
}

static void draw_bar(const struct cli *cli, uint64_t done, uint64_t total, double rate)
{
    enum { WIDTH = 30 };
    char a[32], b[32], c[32], bar[WIDTH + 1];
    int full = total ? (int)((double)WIDTH * (double)done / (double)total) : WIDTH;
    for (int i = 0; i < WIDTH; i++)
        bar[i] = i < full ? '#' : '.';
    bar[WIDTH] = '\0';
    double left = rate > 0 ? ((double)total - (double)done) / rate : 0;
    fprintf(stderr, "\r%s [%s] %s of %s, %s/s, %.0f s left \033[K", cli->verb, bar,
            cli_bytes((double)done, a), cli_bytes((double)total, b), cli_bytes(rate, c), left);
}

static void draw_plain(const struct cli *cli, uint64_t done, uint64_t total, double rate)
{
    char a[32], b[32], c[32];
    double left = rate > 0 ? ((double)total - (double)done) / rate : 0;
    fprintf(stderr, "%s: %s of %s read, %s/s, %.0f s left\n", cli->verb, cli_bytes((double)done, a),
            cli_bytes((double)total, b), cli_bytes(rate, c), left);
}

static void on_progress(void *user, uint64_t done, uint64_t total)
{
    struct cli *cli = user;
    double pause = cli->progress == PROGRESS_PLAIN ? 10 : 1.0 / 6;
    double t = cli_seconds(cli);
    if (t - cli->last_drawn < pause && !(done == total && cli->progress != PROGRESS_PLAIN))
        return;
    cli->last_drawn = t;
    double rate = t > 0 ? (double)done / t : 0;
    if (cli->progress == PROGRESS_BAR)
        draw_bar(cli, done, total, rate);
    else if (cli->progress == PROGRESS_PLAIN)
        draw_plain(cli, done, total, rate);
    else
        fprintf(stderr, "{\"done_bytes\": %llu, \"total_bytes\": %llu, \"seconds\": %.3f}\n",
                (unsigned long long)done, (unsigned long long)total, t);
    cli->drew = cli->progress == PROGRESS_BAR;
}

double cli_number(struct argp_state *state, const char *option, const char *text)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end || errno == ERANGE || !isfinite(value))
        argp_error(state, "%s: %s is not a number", option, text);
    return value;
}

uint64_t cli_count(struct argp_state *state, const char *option, const char *text)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno)
        argp_error(state, "%s: %s is not a whole number", option, text);
    return value;
}

int cli_choice(struct argp_state *state, const char *option, const char *text,
               const char *const *names)
{
    char all[256] = "";
    for (int i = 0; names[i]; i++) {
        if (!strcmp(text, names[i]))
            return i;
        size_t n = strlen(all);
        snprintf(all + n, sizeof all - n, "%s%s", i ? ", " : "", names[i]);
    }
    argp_error(state, "%s: %s is not one of %s", option, text, all);
    return 0;
}

enum perta_compute cli_compute(struct argp_state *state, const char *text)
{
    static const char *const names[] = {"auto", "f32", "bf16", NULL};
    return (enum perta_compute)cli_choice(state, "--compute", text, names);
}

enum perta_rounding cli_rounding(struct argp_state *state, const char *text)
{
    const char *names[PERTA_N_ROUNDINGS] = {NULL};
    for (int i = 1; i < PERTA_N_ROUNDINGS; i++)
        names[i - 1] = perta_rounding_name((enum perta_rounding)i);
    return (enum perta_rounding)(1 + cli_choice(state, "--quantize", text, names));
}

void cli_say_rounded(const struct cli *cli, const json_t *result)
{
    const char *format = json_string_value(json_object_get(result, "quantize"));
    if (format)
        cli_say(cli, "quantize       %s (%lld parameters rounded)\n", format,
                (long long)json_integer_value(json_object_get(result, "rounded_parameters")));
}

void cli_stats(struct argp_state *state, const char *text, bool *mean, bool *meansq)
{
    static const char *const names[] = {"mean", "meansq", NULL};
    bool has[2] = {false, false};
    char *copy = strdup(text);
    if (!copy)
        abort();
    for (char *rest = copy, *name; (name = strsep(&rest, ","));)
        has[cli_choice(state, "--stat", name, names)] = true;
    free(copy);
    *mean = has[0];
    *meansq = has[1];
}

error_t cli_one_argument(int key, char *arg, struct argp_state *state, const char **argument,
                         const char *missing)
{
    if (key == ARGP_KEY_NO_ARGS)
        argp_error(state, "%s", missing);
    if (key != ARGP_KEY_ARG || state->arg_num)
        return ARGP_ERR_UNKNOWN;
    *argument = arg;
    return 0;
}

/* Parse a size such as 512M, 1G or 2GiB; units are powers of 1024. */
static uint64_t size_of(struct argp_state *state, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    static const char units[] = "KMGT";
    const char *unit = isalpha((unsigned char)*end) ? strchr(units, *end & ~0x20) : NULL;
    if (unit) {
        value *= exp2(10.0 * (double)(unit - units + 1));
        end++;
    }
    if (!strcmp(end, "iB") || !strcmp(end, "B"))
        end += strlen(end);
    if (end == text || *end || !(value >= 1) || value > 0x1p60)
        argp_error(state, "--memory: %s is not a size; write for example 512M or 8G", text);
    return (uint64_t)value;
}

static error_t parse_common(int key, char *arg, struct argp_state *state)
{
    static const char *const ios[] = {"auto", "direct", "mmap", "pread", NULL};
    static const char *const styles[] = {"auto", "bar", "plain", "json", "none", NULL};
    struct cli *cli = state->input;
    uint64_t n;
    switch (key) {
    case KEY_MEMORY:
        cli->run.memory_bytes = size_of(state, arg);
        return 0;
    case KEY_THREADS:
        n = cli_count(state, "--threads", arg);
        if (!n || n > 256)
            argp_error(state, "--threads: must be from 1 to %d", PERTA_THREADS_MAX);
        cli->run.n_threads = (unsigned)n;
        return 0;
    case KEY_IO:
        cli->run.io = (enum perta_io_mode)cli_choice(state, "--io", arg, ios);
        return 0;
    case KEY_PROGRESS:
        cli->progress = (enum progress_style)cli_choice(state, "--progress", arg, styles);
        return 0;
    case KEY_JSON:
        cli->json = true;
        return 0;
    case 'q':
        cli->quiet = true;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_option common_options[] = {
    {"memory", KEY_MEMORY, "SIZE", 0, "Memory budget of the whole process (default 1G)", 90},
    {"threads", KEY_THREADS, "N", 0, "Worker threads (default: one per CPU that it may use)", 90},
    {"io", KEY_IO, "HOW", 0,
     "How files are read: auto (default), direct (io_uring, past the page cache), mmap, or "
     "pread (by threads); `perta inspect --io PATH' says what auto picks",
     90},
    {"json", KEY_JSON, NULL, 0, "Print the result as one JSON object", 90},
    {"quiet", 'q', NULL, 0, "Print errors only", 90},
    {"progress", KEY_PROGRESS, "HOW", 0,
     "How to show progress on stderr: auto (default), bar, plain, json or none", 90},
    {0}};

const struct argp cli_common_argp = {common_options, parse_common, NULL, NULL, NULL, NULL, NULL};

static error_t parse_writing(int key, char *arg, struct argp_state *state)
{
    (void)arg;
    struct cli *cli = state->input;
    switch (key) {
    case KEY_FORCE:
        cli->force = true;
        return 0;
    case KEY_DRY_RUN:
        cli->run.dry_run = true;
        return 0;
    case KEY_RESUME:
        cli->run.resume = true;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_option writing_options[] = {
    {"force", KEY_FORCE, NULL, 0,
     "Replace an existing output folder and the leftovers of an interrupted run, if they hold "
     "nothing else",
     80},
    {"resume", KEY_RESUME, NULL, 0,
     "Continue an interrupted run that had the same flags; if there is none, start from the "
     "beginning",
     80},
    {"dry-run", KEY_DRY_RUN, NULL, 0,
     "Check everything that can be checked without reading tensors; write nothing", 80},
    {0}};

const struct argp cli_writing_argp = {writing_options, parse_writing, NULL, NULL, NULL, NULL, NULL};

static error_t parse_patching(int key, char *arg, struct argp_state *state)
{
    (void)arg;
    struct cli *cli = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = cli;
        return 0;
    case KEY_STATEMENT:
        cli->statement = true;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_option patching_options[] = {
    {"statement", KEY_STATEMENT, NULL, 0,
     "Also write PATCH.intoto.json, an in-toto statement of how, when and where the patch was "
     "made",
     80},
    {0}};
static const struct argp_child patching_children[] = {{&cli_writing_argp, 0, NULL, 0}, {0}};

const struct argp cli_patching_argp = {patching_options,  parse_patching, NULL, NULL,
                                       patching_children, NULL,           NULL};

/* Allow as many open files as the system permits: gradient dumps come in hundreds. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void catch_signals(void)
{
    /* A second Ctrl-C kills the process; the next run reports its leftovers. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    signal(SIGXFSZ, SIG_IGN); /* a file size limit then gives an error, as a full disk does */
}

/* The command with --resume added, ready to paste into a shell; empty if it cannot be given. */
static char resume_command[1 << 16];

static void add_word(FILE *to, const char *word)
{
    if (*word && strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                              "_@%+=:,./-") == strlen(word)) {
        fprintf(to, " %s", word);
        return;
    }
    fputs(" '", to);
    for (; *word; word++)
        fputs(*word == '\'' ? "'\\''" : (char[]){*word, '\0'}, to);
    putc('\'', to);
}

/* Call before the arguments are parsed. */
static void remember_resume_command(int argc, char **argv)
{
    bool fits = true, resume = false;
    FILE *to = fmemopen(resume_command, sizeof resume_command, "w");
    if (!to)
        return;
    fputs(program_invocation_name, to);
    for (int i = 0; i < argc; i++) {
        add_word(to, argv[i]);
        fits = fits && perta_text_is_plain(argv[i]);
        resume = resume || !strcmp(argv[i], "--resume");
    }
    if (!resume)
        add_word(to, "--resume");
    if (fclose(to) || !fits || strlen(resume_command) >= sizeof resume_command - 1)
        *resume_command = '\0';
}

/* An empty argument usually comes from an unset shell variable; a later message about a file
 * without a name would not say that. */
static void refuse_empty_words(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i - 1], "--"); i++) {
        const char *equals = strchr(argv[i], '=');
        bool is_option = !strncmp(argv[i], "--", 2), of_option = !strncmp(argv[i - 1], "--", 2);
        if (*argv[i] && !(is_option && equals && !equals[1]))
            continue;
        fprintf(stderr,
                "perta %s: %.*s: empty, but a name or a value is needed; is a variable of the "
                "shell unset?\n",
                argv[0], *argv[i] ? (int)(equals - argv[i]) : 64,
                *argv[i]             ? argv[i]
                : of_option && i > 1 ? argv[i - 1]
                                     : "an argument");
        exit(2);
    }
}

void cli_parse(struct cli *cli, const struct argp *argp, int argc, char **argv, void *input)
{
    *cli = (struct cli){
        .verb = argv[0],
        .run = {.memory_bytes = PERTA_MEMORY_DEFAULT, .cancel = &cancelled},
        .started = now(),
    };
    refuse_empty_words(argc, argv);
    remember_resume_command(argc, argv);
    char name[64];
    snprintf(name, sizeof name, "perta %s", argv[0]);
    argv[0] = name;
    argp_err_exit_status = 2;
    argp_parse(argp, argc, argv, 0, NULL, input);
    argv[0] = (char *)(uintptr_t)cli->verb;
    if (cli->progress == PROGRESS_AUTO)
        cli->progress = isatty(STDERR_FILENO) ? PROGRESS_BAR : PROGRESS_PLAIN;
    if (cli->progress != PROGRESS_NONE && !cli->quiet) {
        cli->run.progress = on_progress;
        cli->run.progress_user = cli;
    }
    raise_file_limit();
    catch_signals();
}

static void clear_bar(const struct cli *cli)
{
    if (cli->drew)
        fputs("\r\033[K", stderr);
}

/* DEL is the one control character that is ASCII and that jansson does not escape. */
static void put_ascii(const char *text)
{
    for (; *text; text++)
        if (*text == 0x7f)
            fputs("\\u007F", stdout);
        else
            putchar(*text);
}

/* A part of the result could not be printed because memory ran out. */
static bool lost;

void cli_json(const struct cli *cli, json_t *summary)
{
    /* to a terminal, print no control characters: neither ASCII ones nor those of two bytes */
    const size_t ascii = isatty(STDOUT_FILENO) ? JSON_ENSURE_ASCII : 0;
    clear_bar(cli);
    char *text =
        cli->json ? perta_json_text(summary, JSON_INDENT(1) | JSON_SORT_KEYS | ascii) : NULL;
    if (text && ascii)
        put_ascii(text);
    else if (text)
        fputs(text, stdout);
    if (text)
        putchar('\n');
    lost |= !summary || (cli->json && !text);
    free(text);
    json_decref(summary);
}

char *cli_text(const json_t *json)
{
    char *text = perta_json_text(json, JSON_COMPACT | JSON_ENCODE_ANY | JSON_SORT_KEYS);
    lost |= !text;
    return text;
}

void cli_say(const struct cli *cli, const char *fmt, ...)
{
    if (cli->json || cli->quiet)
        return;
    clear_bar(cli);
    va_list ap;
    va_start(ap, fmt);
    char *text = perta_text_lines(fmt, ap); /* names in it may contain terminal escape sequences */
    va_end(ap);
    if (text)
        fputs(text, stdout);
    lost |= !text;
    free(text);
}

void cli_notes(const struct cli *cli, const json_t *summary)
{
    size_t i;
    json_t *note;
    clear_bar(cli);
    json_array_foreach (json_object_get(summary, "notes"), i, note)
        if (!cli->quiet)
            fprintf(stderr, "perta %s: note: %s\n", cli->verb, json_string_value(note));
}

void cli_say_left_behind(const struct cli *cli, const json_t *result)
{
    size_t i;
    json_t *name;
    json_array_foreach (json_object_get(result, "left_behind"), i, name)
        cli_say(
            cli,
            "  left behind (weights that are not among the model's shards, for example a copy of "
            "it in this or another format, a link out of the folder, or a folder): %s\n",
            json_string_value(name));
}

#define NOTED_KEYS 20

void cli_note_unknown_keys(const struct cli *cli, const json_t *result)
{
    const json_t *keys = json_object_get(result, "unknown_config_keys");
    size_t i, n = json_array_size(keys);
    json_t *key;
    if (cli->quiet || !n)
        return;
    clear_bar(cli);
    fprintf(stderr, "perta %s: note: config.json has keys that perta does not know and ignores:",
            cli->verb);
    json_array_foreach (keys, i, key)
        if (i < NOTED_KEYS)
            fprintf(stderr, "%s %.60s", i ? "," : "", json_string_value(key));
    if (n > NOTED_KEYS)
        fprintf(stderr, " and %zu more", n - NOTED_KEYS);
    fputc('\n', stderr);
}

static const char *stdout_verb = ""; /* the verb, for messages */
static bool stdout_failed;

/* Report the failure once. For a write that failed earlier errno is lost. */
static bool stdout_is_written(void)
{
    errno = 0;
    if (stdout_failed || (!fflush(stdout) && !ferror(stdout)))
        return !stdout_failed;
    stdout_failed = true;
    fprintf(stderr, "perta%s%s: standard output: %s\n", *stdout_verb ? " " : "", stdout_verb,
            errno ? strerror(errno) : "could not be written");
    return false;
}

void cli_check_stdout(void)
{
    if (!stdout_failed && !stdout_is_written())
        _exit(-PERTA_ESYS);
}

int cli_status(const struct cli *cli, int rc, const struct perta_err *err)
{
    clear_bar(cli);
    stdout_verb = cli->verb;
    bool printed = stdout_is_written(); /* before the messages about it */
    if (!rc && printed && lost)
        fprintf(stderr, "perta %s: standard output: %s\n", cli->verb, strerror(ENOMEM));
    if (!rc)
        return printed && !lost ? 0 : -PERTA_ESYS;
    fprintf(stderr, "perta %s: %s\n", cli->verb, err->msg);
    if (err->resumable && *resume_command)
        fprintf(stderr, "perta %s: to resume: %s\n", cli->verb, resume_command);
    if (getenv("PERTA_DEBUG"))
        fprintf(stderr, "perta %s: from %s:%d\n", cli->verb, err->file, err->line);
    return rc == PERTA_EINTR ? 130 : -rc;
}
