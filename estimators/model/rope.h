/* rope.h - rotary positions (Su et al. 2021) of every kind that transformers has: their frequencies,
 * by the formulas of its modeling_rope_utils.py. config_rope.c reads the options. */
#ifndef PERTA_ESTIMATORS_MODEL_ROPE_H
#define PERTA_ESTIMATORS_MODEL_ROPE_H

#include <stdbool.h>
#include <stdint.h>

enum perta_rope_kind {
    PERTA_ROPE_DEFAULT,
    PERTA_ROPE_LINEAR,
    PERTA_ROPE_LLAMA3,
    PERTA_ROPE_DYNAMIC,
    PERTA_ROPE_YARN,
    PERTA_ROPE_LONGROPE,
    PERTA_ROPE_PROPORTIONAL,
};

#define PERTA_ROPE_FREQUENCIES 256 /* the most of a kind other than the first three */

struct perta_rope {
    enum perta_rope_kind kind;
    uint32_t rotated; /* elements of a head that are rotated, an even number */
    bool interleaved; /* they are paired (2i, 2i + 1), otherwise (i, i + rotated / 2) */
    float scale;      /* of cos and sin: attention_factor; 1 for most kinds */
    double theta, factor;
    double original_positions;                /* of LLAMA3, YARN and LONGROPE */
    double low_freq_factor, high_freq_factor; /* LLAMA3 */
    uint32_t max_positions;                   /* DYNAMIC */
    double beta_fast, beta_slow;              /* YARN */
    bool truncate;                            /* YARN */
    double mscale_all_dim;                    /* YARN; 0: none */
    uint32_t n_moving;                        /* PROPORTIONAL: frequencies that are not 0 */
    /* LONGROPE (rotated / 2): of sequences up to original_positions, and of longer ones, whose
     * scale is long_scale */
    float short_factors[PERTA_ROPE_FREQUENCIES], long_factors[PERTA_ROPE_FREQUENCIES];
    float long_scale;
    /* Queries are multiplied by 1 + query_beta * log(1 + floor(position / query_positions)), after
     * their rotation (llama_4_scaling_beta); 0: they are not. */
    double query_beta, query_positions;
};

/* The frequencies, inv_freq (rotated / 2), of sequences of up to perta_rope_short() tokens, or of
 * longer ones. */
void perta_rope_frequencies(const struct perta_rope *rope, bool is_long, float *inv_freq);
/* The length of sequences (the largest position + 1) above which they are long; UINT32_MAX: none
 * is. */
uint32_t perta_rope_short(const struct perta_rope *rope);
/* The length up to which frequencies are known; UINT32_MAX: any. Longer sequences have frequencies
 * in transformers that depend on the length, and on the sequences before. */
uint32_t perta_rope_longest(const struct perta_rope *rope);
/* What a query at this position is multiplied by, after its rotation, in float32. */
float perta_rope_query_scale(const struct perta_rope *rope, uint32_t position);
/* What yarn multiplies by for a context that is factor times as long: 1 for factor <= 1, otherwise
 * 0.1 mscale log(factor) + 1 (Peng et al. 2023, section 3.4). */
double perta_rope_mscale(double factor, double mscale);

#endif
