/* Texts of any length, at a place that moves: no two calls see the same. argv[1]: how many calls. Prints the calls, a sum over
 * what a probe of 32 times 4,096 bytes has to see, and the ns that a call took. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SIZE (1 << 20)
static char text[SIZE];
static uint64_t garbage[1 << 16];
static unsigned long calls;

__attribute__((noinline, noclone)) void look(const char *at, const uint64_t *words) {
    calls++;
    __asm__ volatile("" : : "r"(at), "r"(words) : "memory");
}

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

int main(int argc, char **argv) {
    int times = argc > 1 ? atoi(argv[1]) : 1;
    uint32_t state = 1;
    for (int i = 0; i < SIZE; i++)
        text[i] = (char)('a' + (state = state * 1664525 + 1013904223) / 165191050 % 26);
    for (unsigned i = 0; i < sizeof garbage / sizeof *garbage; i++)
        garbage[i] = i % 3 ? (uint64_t)&garbage[(i * 7919u) % (1 << 16)] : (uint64_t)state * i;
    long start = now();
    for (int i = 0; i < times; i++)
        look(text + i, garbage + i);
    long each = (now() - start) / (times ? times : 1);
    printf("%lu %.16s %ld\n", calls, text, each);
    return 0;
}
