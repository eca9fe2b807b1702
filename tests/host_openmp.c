/* A host program that uses OpenMP and flushes subnormal numbers to zero. Computing with a model
 * leaves both unchanged, uses no OpenMP threads, and gives the same bytes as without them. It works
 * in a scratch folder. */
#include <jansson.h>
#include <omp.h>
#include <perta.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "estimators/model/config.h"
#include "estimators/model/model.h"
#include "tests/strange_fp.h"

#define THREADS 3 /* of the host program, whatever the machine has */

static struct perta_err err;

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "host: %s %s\n", what, err.msg);
    exit(1);
}

static const char config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":300,\"hidden_size\":48,"
    "\"intermediate_size\":80,\"num_hidden_layers\":2,\"num_attention_heads\":4,"
    "\"num_key_value_heads\":2}";

static void write_inputs(void)
{
    struct perta_llm llm;
    struct perta_model model;
    const struct perta_model_file file = {"config.json", config};
    json_t *json = json_loads(config, 0, NULL);
    check(json && !perta_llm_parse(json, "config.json", &llm, &err), "config");
    json_decref(json);
    check(!perta_model_new(&llm, 7, &model, &err), "model");
    check(!perta_model_save(&model, "model", &file, 1, false, &err), "model");
    perta_model_release(&model);
    FILE *data = fopen("data.jsonl", "w");
    for (int line = 0; line < 20; line++)
        for (int i = 0; i <= 40; i++)
            fprintf(data, "%s%d%s", i ? "," : "{\"input_ids\":[", (line * 37 + i * 11) % 300,
                    i == 40 ? "]}\n" : "");
    check(!fclose(data), "data.jsonl");
}

/* The number of threads that the host's own loops get. */
static int team(void)
{
    int n = 0;
#pragma omp parallel
#pragma omp single
    n = omp_get_num_threads();
    return n;
}

static void compute(const char *out)
{
    const struct perta_run run = {.memory_bytes = PERTA_MEMORY_DEFAULT, .n_threads = 2};
    const struct perta_estimate estimate = {
        .model = "model", .data = "data.jsonl", .out = out, .mean = true, .meansq = true};
    const struct perta_eval eval = {.model = "model", .data = "data.jsonl"};
    json_t *summary;
    check(!perta_estimate(&estimate, &run, &summary, &err), "estimate");
    json_decref(summary);
    check(!perta_eval(&eval, &run, &summary, &err), "eval");
    json_decref(summary);
}

int main(void)
{
    char folder[] = "/tmp/perta-host-XXXXXX", command[64];
    check(mkdtemp(folder) && !chdir(folder), folder);
    write_inputs();
    compute("plain");

    omp_set_dynamic(0);
    omp_set_num_threads(THREADS);
    check(team() == THREADS, "OpenMP gives other teams here");
    strange_fp_set(N_STRANGE_FP - 2); /* rounds upwards and flushes everything to zero */
    unsigned before = strange_fp_state();
    compute("strange");
    check(strange_fp_state() == before, "its floating-point environment is another");
    check(omp_get_max_threads() == THREADS && team() == THREADS, "its teams are others");
    check(!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY"), "its environment is another");
    check(!system("cmp plain/mean/model.safetensors strange/mean/model.safetensors && "
                  "cmp plain/meansq/model.safetensors strange/meansq/model.safetensors"),
          "other bytes");
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command) ? 1 : 0;
}
