/* Rounded to float32 where transformers' modeling_rope_utils.py does so. */
#include "estimators/model/rope.h"

#include <math.h>

#include "estimators/compute/backend.h"
#include "estimators/model/config.h"

static const double pi = 3.14159265358979323846;

/* theta^(2i/width), from which all kinds start. */
static float theta_power(double theta, uint32_t i, uint32_t width)
{
    return powf((float)theta, (float)(2 * i) / (float)width);
}

static float llama3(const struct perta_rope *r, uint32_t i)
{
    double f = (double)(1.0f / theta_power(r->theta, i, r->rotated));
    double wavelength = 2 * pi / f;
    double low = r->original_positions / r->low_freq_factor;
    double high = r->original_positions / r->high_freq_factor;
    double smooth = (r->original_positions / wavelength - r->low_freq_factor) /
                    (r->high_freq_factor - r->low_freq_factor);
    if (wavelength > low)
        f /= r->factor;
    else if (wavelength >= high && high < low) /* Llama 4 has nothing between the two */
        f = (1 - smooth) * f / r->factor + smooth * f;
    return (float)f;
}

/* The theta that transformers begins with: for sequences of max_positions. */
static float dynamic(const struct perta_rope *r, uint32_t i)
{
    double max = r->max_positions, D = r->rotated;
    double grown = pow(r->factor * max / max - (r->factor - 1), D / (D - 2));
    return 1.0f / theta_power(r->theta * grown, i, r->rotated);
}

/* The frequency, as a fraction of an index, that rotates so often over the original positions. */
static double yarn_index(const struct perta_rope *r, double rotations)
{
    return r->rotated * log(r->original_positions / (rotations * 2 * pi)) / (2 * log(r->theta));
}

/* Peng et al. 2023: high frequencies stay, low ones are divided by factor, with a ramp between. */
static float yarn(const struct perta_rope *r, uint32_t i)
{
    double low = yarn_index(r, r->beta_fast), high = yarn_index(r, r->beta_slow);
    low = fmax(r->truncate ? floor(low) : low, 0);
    high = fmin(r->truncate ? ceil(high) : high, r->rotated - 1);
    if (low == high)
        high += 0.001;
    float ramp = ((float)i - (float)low) / (float)(high - low);
    float stays = 1.0f - fminf(fmaxf(ramp, 0), 1), power = theta_power(r->theta, i, r->rotated);
    return 1.0f / ((float)r->factor * power) * (1.0f - stays) + 1.0f / power * stays;
}

static float proportional(const struct perta_rope *r, uint32_t i)
{
    return i < r->n_moving ? 1.0f / theta_power(r->theta, i, r->rotated) / (float)r->factor : 0;
}

static float frequency(const struct perta_rope *r, uint32_t i, bool is_long)
{
    switch (r->kind) {
    case PERTA_ROPE_LINEAR:
        return (float)((double)(1.0f / theta_power(r->theta, i, r->rotated)) / r->factor);
    case PERTA_ROPE_LLAMA3:
        return llama3(r, i);
    case PERTA_ROPE_DYNAMIC:
        return dynamic(r, i);
    case PERTA_ROPE_YARN:
        return yarn(r, i);
    case PERTA_ROPE_LONGROPE:
        return 1.0f / ((is_long ? r->long_factors : r->short_factors)[i] *
                       theta_power(r->theta, i, r->rotated));
    case PERTA_ROPE_PROPORTIONAL:
        return proportional(r, i);
    case PERTA_ROPE_DEFAULT:
        break;
    }
    return 1.0f / theta_power(r->theta, i, r->rotated);
}

void perta_rope_frequencies(const struct perta_rope *rope, bool is_long, float *inv_freq)
{
    for (uint32_t i = 0; i < rope->rotated / 2; i++)
        inv_freq[i] = frequency(rope, i, is_long);
}

uint32_t perta_rope_longest(const struct perta_rope *rope)
{
    return rope->kind == PERTA_ROPE_DYNAMIC ? rope->max_positions : UINT32_MAX;
}

uint32_t perta_rope_short(const struct perta_rope *rope)
{
    if (rope->kind == PERTA_ROPE_LONGROPE && rope->original_positions < UINT32_MAX)
        return (uint32_t)rope->original_positions;
    return UINT32_MAX;
}

float perta_rope_query_scale(const struct perta_rope *rope, uint32_t position)
{
    if (!(rope->query_beta > 0))
        return 1;
    float rounds = floorf((float)position / (float)rope->query_positions);
    return 1.0f + (float)rope->query_beta * logf(1.0f + rounds);
}

double perta_rope_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

void perta_llm_rope_tables(const struct perta_llm *llm, float *tables)
{
    for (int i = 0; i < 4; i++)
        perta_rope_frequencies(&llm->ropes[i % 2], i / 2, tables + (size_t)i * (llm->head_dim / 2));
}

struct perta_rotation perta_llm_rotation(const struct perta_llm *llm, uint32_t layer,
                                         const float *table, size_t first)
{
    const struct perta_rope *rope = perta_llm_rope(llm, layer);
    return (struct perta_rotation){.inv_freq = table,
                                   .first = first,
                                   .rotated = rope->rotated,
                                   .interleaved = rope->interleaved,
                                   .factor = rope->scale,
                                   .long_inv_freq = table + 2 * (size_t)(llm->head_dim / 2),
                                   .long_factor = rope->long_scale};
}
