/* What a model needs that is not implemented, for architectures that are refused for it. */
#include "estimators/model/config_read.h"

#include <string.h>
#include <strings.h>

static const struct {
    const char *start; /* of the architecture's name; longer ones come first */
    const char *missing;
} architectures[] = {
    {"FalconMamba", "state-space layers"},
    {"FalconH1", "state-space layers beside attention"},
    {"Mamba", "state-space layers"},
    {"Bamba", "state-space layers"},
    {"Jamba", "state-space layers"},
    {"Zamba", "state-space layers"},
    {"NemotronH", "state-space layers"},
    {"GraniteMoeHybrid", "state-space layers"},
    {"Rwkv", "recurrent layers"},
    {"RecurrentGemma", "recurrent layers"},
    {"xLSTM", "recurrent layers"},
    {"Qwen3Next", "linear attention (gated delta rule)"},
    {"Qwen3_5", "linear attention (gated delta rule)"},
    {"Qwen4Exp", "linear attention (gated delta rule), and sparse attention with an indexer"},
    {"OlmoHybrid", "linear attention (gated delta rule)"},
    {"KimiLinear", "linear attention (Kimi delta attention)"},
    {"BailingHybrid", "linear attention"},
    {"MiniMaxM1", "linear attention (lightning attention)"},
    {"MiniMaxText01", "linear attention (lightning attention)"},
    {"MiniMaxForCausalLM", "linear attention (lightning attention)"},
    {"Lfm", "short convolutions between layers of attention"},
    {"Gemma3n", "per-layer embeddings"},
    {"Gemma4", "per-layer embeddings"},
    {"DeepseekV32", "sparse attention with an indexer"},
    {"DeepseekV4", "sparse attention with an indexer"},
    {"GlmMoeDsa", "sparse attention with an indexer"},
    {"LongcatFlash", "experts without computation, and two blocks in a layer"},
    {"DiffLlama", "differential attention"},
    {"Mllama", "cross-attention to images"},
    {"Blt", "patches of bytes"},
    {"Doge", "attention with a mask that is learnt"},
    {"JetMoe", "experts of attention"},
};

const char *perta_config_missing(const char *architecture)
{
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++)
        if (!strncasecmp(architecture, architectures[i].start, strlen(architectures[i].start)))
            return architectures[i].missing;
    return NULL;
}
