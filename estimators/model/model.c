#include "estimators/model/model.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "estimators/model/weights.h"
#include "io/format/convert.h"
#include "io/fpenv.h"
#include "io/publish/publish.h"

/* ---- parameters ---- */

static int add_parameter(void *ctx, const char *name, const struct perta_tensor_shape *shape,
                         struct perta_err *err)
{
    struct perta_model *m = ctx;
    size_t cols = shape->dims[shape->n_dims - 1], rows = 1;
    for (size_t i = 0; i + 1 < shape->n_dims; i++)
        rows *= shape->dims[i];
    struct perta_parameter *grown =
        realloc(m->parameters, (m->n_parameters + 1) * sizeof *m->parameters);
    if (!grown)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    m->parameters = grown;
    struct perta_parameter *p = &grown[m->n_parameters];
    *p = (struct perta_parameter){strdup(name), rows, cols, shape->n_dims == 1, m->n_floats};
    if (!p->name)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    m->n_parameters++;
    m->n_floats += p->out * p->in;
    return 0;
}

static int lay_out(const struct perta_llm *llm, struct perta_model *m, struct perta_err *err)
{
    *m = (struct perta_model){.llm = *llm};
    int rc = perta_llm_each(llm, add_parameter, m, err);
    if (rc)
        return rc;
    m->weights = calloc(m->n_floats, sizeof *m->weights);
    return m->weights ? 0 : perta_fail_sys(err, ENOMEM, "a model of %zu parameters", m->n_floats);
}

void perta_model_release(struct perta_model *m)
{
    for (size_t i = 0; i < m->n_parameters; i++)
        free(m->parameters[i].name);
    free(m->parameters);
    free(m->weights);
    *m = (struct perta_model){0};
}

static const struct perta_parameter *find(const struct perta_model *m, const char *name)
{
    for (size_t i = 0; i < m->n_parameters; i++)
        if (!strcmp(m->parameters[i].name, name))
            return &m->parameters[i];
    return NULL;
}

float *perta_model_find(const struct perta_model *m, float *array, const char *name)
{
    const struct perta_parameter *p = find(m, name);
    return p ? array + p->at : NULL;
}

const struct perta_parameter *perta_model_param(const struct perta_model *m, struct perta_site site,
                                                const struct perta_param_row *row)
{
    char name[PERTA_NAME_BYTES];
    return find(m, perta_llm_name(&m->llm, site, row, name));
}

static int get(struct perta_parameters *from, struct perta_site site,
               const struct perta_param_row *row, struct perta_value *value, struct perta_err *err)
{
    const struct perta_model_parameters *of = (struct perta_model_parameters *)(void *)from;
    const struct perta_parameter *p = perta_model_param(of->model, site, row);
    (void)err; /* a model has every parameter of its family */
    *value = (struct perta_value){perta_array_at(of->weights, p->at), PERTA_F32,
                                  p->vector ? 0 : p->out, p->in, false};
    return 0;
}

struct perta_model_parameters perta_model_parameters(const struct perta_model *m,
                                                     struct perta_array weights)
{
    return (struct perta_model_parameters){{get}, m, weights};
}

/* ---- new ---- */

/* A number in (0, 1] that depends on seed and i alone. */
static double uniform(uint64_t seed, uint64_t i)
{
    return ((double)(XXH3_64bits_withSeed(&i, sizeof i, seed) >> 11) + 1) * 0x1p-53;
}

/* Box & Muller 1958. */
static float normal(uint64_t seed, uint64_t i)
{
    const double pi = 3.14159265358979323846;
    return (float)(sqrt(-2 * log(uniform(seed, 2 * i))) * cos(2 * pi * uniform(seed, 2 * i + 1)));
}

int perta_model_new(const struct perta_llm *llm, uint64_t seed, struct perta_model *m,
                    struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = lay_out(llm, m, err);
    for (size_t p = 0; p < m->n_parameters && !rc; p++) {
        const struct perta_parameter *of = &m->parameters[p];
        bool bias = of->vector && !strcmp(of->name + strlen(of->name) - 5, ".bias");
        for (size_t i = of->at; i < of->at + of->out * of->in; i++)
            m->weights[i] = of->vector ? (bias ? 0.0f : 1.0f) : 0.02f * normal(seed, i);
    }
    if (rc)
        perta_model_release(m);
    return rc;
}

/* ---- load ---- */

static int load_all(struct perta_weights *w, struct perta_model *m, struct perta_err *err)
{
    size_t most = 0;
    for (size_t p = 0; p < m->n_parameters; p++) {
        size_t n = m->parameters[p].out * m->parameters[p].in;
        most = n > most ? n : most;
    }
    size_t room_bytes = (size_t)perta_weights_room(most * sizeof(float));
    uint8_t *room = aligned_alloc(PERTA_BLOCK_BYTES, room_bytes);
    int rc = room ? perta_weights_start(w, PERTA_IO_PREAD, err)
                  : perta_fail_sys(err, ENOMEM, "%s", w->ck->path);
    for (size_t p = 0; p < m->n_parameters && !rc; p++) {
        const struct perta_parameter *of = &m->parameters[p];
        rc = perta_weights_vector(w, of->name, 0, of->out * of->in, room, m->weights + of->at, err);
    }
    perta_weights_close(w); /* before room, into which it reads, is freed */
    free(room);
    return rc;
}

int perta_model_load(const char *path, struct perta_model *m, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    struct perta_weights w;
    *m = (struct perta_model){0};
    int rc = perta_weights_open(&w, path, err);
    if (!rc)
        rc = lay_out(&w.llm, m, err);
    if (rc)
        perta_weights_close(&w);
    else
        rc = load_all(&w, m, err);
    if (rc)
        perta_model_release(m);
    return rc;
}

/* ---- save ---- */

/* Encode a safetensors file: header, then every parameter in bfloat16. */
static int encode(struct perta_model *m, uint8_t **bytes, uint64_t *len_bytes,
                  struct perta_err *err)
{
    struct perta_tensor *tensors = calloc(m->n_parameters, sizeof *tensors);
    uint64_t *shapes = calloc(m->n_parameters, 2 * sizeof *shapes);
    json_t *metadata = json_pack("{s:s}", "format", "pt");
    uint8_t *header = NULL;
    uint64_t header_bytes = 0;
    *bytes = NULL;
    int rc = tensors && shapes && metadata ? 0 : perta_fail_sys(err, ENOMEM, "a model");
    for (size_t p = 0; p < m->n_parameters && !rc; p++) {
        const struct perta_parameter *of = &m->parameters[p];
        uint64_t *shape = shapes + 2 * p;
        shape[0] = of->vector ? of->in : of->out;
        shape[1] = of->in;
        tensors[p] = (struct perta_tensor){.name = of->name,
                                           .dtype = PERTA_BF16,
                                           .n_dims = of->vector ? 1 : 2,
                                           .shape = shape,
                                           .n_elems = of->out * of->in};
    }
    if (!rc)
        rc = perta_safetensors_build(tensors, m->n_parameters, metadata, &header, &header_bytes,
                                     err);
    *len_bytes = header_bytes + 2 * m->n_floats;
    if (!rc && !(*bytes = malloc(*len_bytes)))
        rc = perta_fail_sys(err, ENOMEM, "a model");
    if (!rc)
        memcpy(*bytes, header, header_bytes);
    for (size_t i = 0; i < m->n_floats && !rc; i++) {
        uint16_t half = perta_bf16_from_f32(m->weights[i]);
        m->weights[i] = perta_f32_from_bf16(half);
        memcpy(*bytes + header_bytes + 2 * i, &half, 2);
    }
    free(header);
    json_decref(metadata);
    free(shapes);
    free(tensors);
    return rc;
}

int perta_model_save(struct perta_model *m, const char *path, const struct perta_model_file *files,
                     size_t n_files, bool force, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    struct perta_publish folder = {0};
    uint8_t *bytes = NULL;
    uint64_t len_bytes;
    int rc = perta_publish_begin(&folder, path, NULL, force, err);
    if (!rc)
        rc = encode(m, &bytes, &len_bytes, err);
    if (!rc)
        rc = perta_publish_file(&folder, "model.safetensors", bytes, len_bytes, err);
    for (size_t i = 0; i < n_files && !rc; i++)
        rc = perta_publish_file(&folder, files[i].name, files[i].text, strlen(files[i].text), err);
    if (!rc)
        rc = perta_publish_commit(&folder, err);
    perta_publish_release(&folder);
    free(bytes);
    return rc;
}
