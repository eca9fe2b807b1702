#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

struct elems {
    const struct perta_activation *act;
    float *h, *dgate, *dup, *dx;
    const float *dh, *gate, *up, *x;
};

/* ---- gated linear units ---- */

static void glu_elems(const void *args, size_t from, size_t to)
{
    const struct elems *e = args;
    perta_activation_kernels(e->act->kind)
        ->glu(e->act, e->h + from, e->gate + from, e->up + from, to - from);
}

void perta_cpu_glu_forward(struct perta_backend *be, const struct perta_activation *act,
                           struct perta_array h, struct perta_array gate, struct perta_array up,
                           size_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct elems e = {.act = act,
                            .h = perta_cpu_at(cpu, h),
                            .gate = perta_cpu_at(cpu, gate),
                            .up = perta_cpu_at(cpu, up)};
    perta_cpu_share_out(cpu, n, 1, glu_elems, &e);
}

static void glu_backward_elems(const void *args, size_t from, size_t to)
{
    const struct elems *e = args;
    perta_activation_kernels(e->act->kind)
        ->glu_backward(e->act, e->dgate + from, e->dup + from, e->dh + from, e->gate + from,
                       e->up + from, to - from);
}

void perta_cpu_glu_backward(struct perta_backend *be, const struct perta_activation *act,
                            struct perta_array dgate, struct perta_array dup, struct perta_array dh,
                            struct perta_array gate, struct perta_array up, size_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct elems e = {.act = act,
                            .dgate = perta_cpu_at(cpu, dgate),
                            .dup = perta_cpu_at(cpu, dup),
                            .dh = perta_cpu_at(cpu, dh),
                            .gate = perta_cpu_at(cpu, gate),
                            .up = perta_cpu_at(cpu, up)};
    perta_cpu_share_out(cpu, n, 1, glu_backward_elems, &e);
}

/* ---- without a gate ---- */

static void act_elems(const void *args, size_t from, size_t to)
{
    const struct elems *e = args;
    perta_activation_kernels(e->act->kind)->each(e->h + from, e->x + from, to - from);
}

void perta_cpu_act_forward(struct perta_backend *be, const struct perta_activation *act,
                           struct perta_array h, struct perta_array x, size_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct elems e = {.act = act, .h = perta_cpu_at(cpu, h), .x = perta_cpu_at(cpu, x)};
    perta_cpu_share_out(cpu, n, 1, act_elems, &e);
}

static void act_backward_elems(const void *args, size_t from, size_t to)
{
    const struct elems *e = args;
    perta_activation_kernels(e->act->kind)
        ->each_backward(e->dx + from, e->dh + from, e->x + from, to - from);
}

void perta_cpu_act_backward(struct perta_backend *be, const struct perta_activation *act,
                            struct perta_array dx, struct perta_array dh, struct perta_array x,
                            size_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct elems e = {.act = act,
                            .dx = perta_cpu_at(cpu, dx),
                            .dh = perta_cpu_at(cpu, dh),
                            .x = perta_cpu_at(cpu, x)};
    perta_cpu_share_out(cpu, n, 1, act_backward_elems, &e);
}
