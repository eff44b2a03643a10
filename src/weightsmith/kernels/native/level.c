/* Which of the compiled levels this processor, and the kernel of its operating system, can run. */
#if defined(__x86_64__)
#include <cpuid.h>

static unsigned long long enabled_state(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

__attribute__((visibility("default"))) int ws_level(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned first = 1u << 12 | 1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA MOVBE POPCNT OSXSAVE AVX F16C */
    if ((c & first) != first || (enabled_state() & 6) != 6) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned second = 1u << 3 | 1u << 5 | 1u << 8; /* BMI1 AVX2 BMI2 */
    if ((b & second) != second) return 0;
    const unsigned third = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* AVX512 F DQ CD BW VL */
    return (b & third) == third && (enabled_state() & 0xe6) == 0xe6 ? 4 : 3;
}
#else
__attribute__((visibility("default"))) int ws_level(void) { return 0; }
#endif
