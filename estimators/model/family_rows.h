/* family_rows.h - short words for the tables of parameters (family.h) in family*.c, and the rows that
 * many families share. Only included there. */
#ifndef PERTA_ESTIMATORS_MODEL_FAMILY_ROWS_H
#define PERTA_ESTIMATORS_MODEL_FAMILY_ROWS_H

#include "estimators/model/family.h"

#define HIDDEN PERTA_WIDTH_HIDDEN
#define INNER PERTA_WIDTH_INTERMEDIATE
#define QUERIES PERTA_WIDTH_QUERIES
#define KEYS PERTA_WIDTH_KEYS
#define VALUES PERTA_WIDTH_VALUES
#define QKV PERTA_WIDTH_QKV
#define ATTENDED PERTA_WIDTH_ATTENDED
#define HEAD PERTA_WIDTH_HEAD
#define EXPERTS PERTA_WIDTH_EXPERTS
#define EXPERT PERTA_WIDTH_EXPERT
#define SHARED PERTA_WIDTH_SHARED
#define VECTOR PERTA_WIDTH_NONE

#define PARAMS(rows) .params = rows, .n_params = sizeof rows / sizeof *rows

/* clang-format off */

/* Attention and norms, as in Llama. */
#define ATTENTION                                                                          \
    {PERTA_Q, "self_attn.q_proj.weight", QUERIES, HIDDEN, PERTA_ALWAYS, false},            \
    {PERTA_Q_BIAS, "self_attn.q_proj.bias", VECTOR, QUERIES, PERTA_QKV_HAS_BIAS, false},   \
    {PERTA_K, "self_attn.k_proj.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},               \
    {PERTA_K_BIAS, "self_attn.k_proj.bias", VECTOR, KEYS, PERTA_QKV_HAS_BIAS, false},      \
    {PERTA_V, "self_attn.v_proj.weight", VALUES, HIDDEN, PERTA_ALWAYS, false},             \
    {PERTA_V_BIAS, "self_attn.v_proj.bias", VECTOR, VALUES, PERTA_QKV_HAS_BIAS, false},    \
    {PERTA_O, "self_attn.o_proj.weight", HIDDEN, ATTENDED, PERTA_ALWAYS, false},           \
    {PERTA_O_BIAS, "self_attn.o_proj.bias", VECTOR, HIDDEN, PERTA_O_HAS_BIAS, false}
#define NORMS                                                                              \
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},         \
    {PERTA_NORM_2, "post_attention_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false}

/* Its MLP, and one without a gate. */
#define GATED(when)                                                                        \
    {PERTA_GATE, "mlp.gate_proj.weight", INNER, HIDDEN, when, false},                      \
    {PERTA_GATE_BIAS, "mlp.gate_proj.bias", VECTOR, INNER, (when) | PERTA_MLP_HAS_BIAS, false}, \
    UNGATED(when)
#define UNGATED(when)                                                                      \
    {PERTA_UP, "mlp.up_proj.weight", INNER, HIDDEN, when, false},                          \
    {PERTA_UP_BIAS, "mlp.up_proj.bias", VECTOR, INNER, (when) | PERTA_MLP_HAS_BIAS, false},  \
    {PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, when, false},                      \
    {PERTA_DOWN_BIAS, "mlp.down_proj.bias", VECTOR, HIDDEN, (when) | PERTA_MLP_HAS_BIAS, false}

/* clang-format on */

#endif
