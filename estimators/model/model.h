/* model.h - a small model that is held in memory whole, in float32: create, load, save. */
#ifndef PERTA_ESTIMATORS_MODEL_MODEL_H
#define PERTA_ESTIMATORS_MODEL_MODEL_H

#include "estimators/model/part.h"

struct perta_parameter {
    char *name;
    size_t out, in; /* a vector has out = 1 */
    bool vector;
    size_t at; /* index of its first float in perta_model.weights */
};

struct perta_model {
    struct perta_llm llm;
    struct perta_parameter *parameters; /* (n_parameters), in the order in which they are saved */
    size_t n_parameters, n_floats;
    float *weights; /* (n_floats) */
};

/* The parameters of a model whose weights a backend shares. */
struct perta_model_parameters {
    struct perta_parameters parameters;
    const struct perta_model *model;
    struct perta_array weights; /* the model's weights in the backend */
};

/* A model with initial weights as in transformers: matrices normal with standard deviation 0.02,
 * norms 1, biases 0. The caller releases it with perta_model_release. */
PERTA_API int perta_model_new(const struct perta_llm *llm, uint64_t seed, struct perta_model *model,
                              struct perta_err *err);
/* Load a model from a checkpoint folder with config.json. */
PERTA_API int perta_model_load(const char *path, struct perta_model *model, struct perta_err *err);
PERTA_API void perta_model_release(struct perta_model *model);

/* Write a checkpoint folder in bfloat16: model.safetensors and the given files (n), config.json
 * among them. The weights in memory are rounded, too. With force, replaces a checkpoint that
 * exists. */
struct perta_model_file {
    const char *name, *text;
};
PERTA_API int perta_model_save(struct perta_model *model, const char *path,
                               const struct perta_model_file *files, size_t n_files, bool force,
                               struct perta_err *err);

/* The floats of the parameter of this name, in array (n_floats); NULL if there is none. */
float *perta_model_find(const struct perta_model *model, float *array, const char *name);
/* A parameter of a layer; NULL if the model does not have it. */
const struct perta_parameter *perta_model_param(const struct perta_model *model,
                                                struct perta_site site,
                                                const struct perta_param_row *row);
/* weights: the model's, in a backend that shares them. */
struct perta_model_parameters perta_model_parameters(const struct perta_model *model,
                                                     struct perta_array weights);

#endif
