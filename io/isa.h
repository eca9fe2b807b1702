/* isa.h - one plain C source, compiled for x86-64-v2, v3 and v4, chosen at run time.
 *
 * The build compiles each kernel file once for each instruction set with -DPERTA_ISA=v2 (or v3,
 * v4); PERTA_ISA_NAME(edit) is then edit_v2 and so on. All give bit-identical results:
 * -ffp-contract=off, no reassociation. PERTA_ISA=v2|v3|v4 in the environment chooses by hand (never
 * above what the CPU has), for tests and measurements. */
#ifndef PERTA_IO_ISA_H
#define PERTA_IO_ISA_H

#include "io/err.h"

enum perta_isa { PERTA_ISA_V2, PERTA_ISA_V3, PERTA_ISA_V4, PERTA_N_ISAS };

/* The instruction set in use. It is determined once. */
PERTA_API enum perta_isa perta_isa_chosen(void);
/* The best one that this CPU has, whatever the environment says. */
PERTA_API enum perta_isa perta_isa_best(void);
PERTA_API const char *perta_isa_name(enum perta_isa isa);

#define PERTA_ISA_PASTE_(name, isa) name##_##isa
#define PERTA_ISA_PASTE(name, isa) PERTA_ISA_PASTE_(name, isa)
#define PERTA_ISA_NAME(name) PERTA_ISA_PASTE(name, PERTA_ISA)

#endif
