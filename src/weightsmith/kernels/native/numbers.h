/* What all kernels share: types, the levels of the instruction set, and numbers in fewer bits.
 *
 * Results must not depend on the processor. Every operation is one IEEE 754 operation, rounded once: compile without
 * contraction to fused multiply-add and without -ffast-math. Sums run in LANES interleaved partial sums whatever the
 * width of the vectors the compiler chose.
 *
 * Every file is compiled once per level of the instruction set (-DWS_LEVEL=...); see kernels/native/__init__.py.
 */
#ifndef WEIGHTSMITH_NUMBERS_H
#define WEIGHTSMITH_NUMBERS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WS_LEVEL
#define WS_LEVEL 0
#endif
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
/* First in a declaration: after a pointer's star, GCC takes the attribute for the pointer's and ignores it. */
#define EXPORT __attribute__((visibility("default")))
#define OF_LEVEL(name) PASTE(name, WS_LEVEL)

#define LANES 16
#define ALIGNMENT 64

typedef float f32;
typedef double f64;
typedef uint16_t u16;
/* Elements of files, which begin where the header ends. */
typedef f32 f32_anywhere __attribute__((aligned(1)));
typedef f64 f64_anywhere __attribute__((aligned(1)));
typedef u16 u16_anywhere __attribute__((aligned(1)));
typedef ptrdiff_t len;

static f64 joined(const f64 *lanes) {
    f64 part[LANES];
    memcpy(part, lanes, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

static inline f32 from_bits(uint32_t bits) {
    f32 value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint32_t to_bits(f32 value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline f32 from_half(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (f32)value;
}

#endif
