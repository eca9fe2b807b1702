/* model.h - a model so small that it is held in memory whole, in float32: made, loaded, saved. */
#ifndef PERTA_ESTIMATORS_MODEL_MODEL_H
#define PERTA_ESTIMATORS_MODEL_MODEL_H

#include "estimators/model/part.h"

struct perta_parameter {
    char *name;
    size_t out, in; /* a vector has out = 1 */
    bool vector;
    size_t at; /* of its floats in perta_model.weights */
};

struct perta_model {
    struct perta_llm llm;
    struct perta_parameter *parameters; /* (n_parameters), in the order they are saved */
    size_t n_parameters, n_floats;
    float *weights; /* (n_floats) */
};

/* Its parameters as a backend sees them. */
struct perta_model_parameters {
    struct perta_parameters parameters;
    const struct perta_model *model;
    struct perta_array weights; /* the model's, shared with the backend */
};

/* Weights as transformers begins: matrices normal with deviation 0.02, norms 1, biases 0. The
 * caller's, perta_model_release. */
PERTA_API int perta_model_new(const struct perta_llm *llm, uint64_t seed, struct perta_model *model,
                              struct perta_err *err);
/* From a checkpoint folder with config.json. */
PERTA_API int perta_model_load(const char *path, struct perta_model *model, struct perta_err *err);
PERTA_API void perta_model_release(struct perta_model *model);

/* A checkpoint folder in bfloat16: model.safetensors, and files (n, name and text) beside it,
 * config.json among them. Leaves the weights in memory rounded as they are on disk. With force it
 * replaces a checkpoint that is there. */
struct perta_model_file {
    const char *name, *text;
};
PERTA_API int perta_model_save(struct perta_model *model, const char *path,
                               const struct perta_model_file *files, size_t n_files, bool force,
                               struct perta_err *err);

/* Where a parameter's floats are, in array (n_floats); NULL: the model has none of that name. */
float *perta_model_find(const struct perta_model *model, float *array, const char *name);
/* A layer's parameter. NULL: the model has none of that name. */
const struct perta_parameter *perta_model_param(const struct perta_model *model, uint32_t layer,
                                                const struct perta_param_row *row);
/* struct perta_parameters of a model whose weights the backend shares. */
struct perta_model_parameters perta_model_parameters(const struct perta_model *model,
                                                     struct perta_array weights);

#endif
