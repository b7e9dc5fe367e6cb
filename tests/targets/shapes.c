/* Types, variables and lines of C as debug information describes them. It runs once, for a debugger: places marked HERE are
 * compared with what gdb says there. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum colour { RED = 1, GREEN = 200, BLUE = -3 };
enum wide { LARGE = 0x80000000u };
typedef unsigned int word;
typedef struct point {
    int x, y;
} point_t;

struct __attribute__((packed)) tight {
    char tag;
    uint64_t length : 40;
    int low : 3;
    unsigned high : 13;
};

struct shape {
    const char *name;
    enum colour colour;
    unsigned flags : 3, kind : 5;
    long wide_bits : 33;
    point_t corners[2][3];
    union {
        long number;
        double ratio;
        struct {
            short low, high;
        };
    };
    struct shape *next;
    int (*area)(const struct shape *, word);
    char text[];
};

struct opaque;
struct opaque *nobody;
static int hidden_counter = 7;
int visible_counter = 40;
const char *const greeting = "hello";
enum wide large = LARGE;
struct tight tight = {.tag = 't', .length = 5, .low = -1, .high = 99};
struct shape first = {.name = "first", .colour = BLUE, .flags = 5, .kind = 9};
_Thread_local int per_thread = 3;

static inline __attribute__((always_inline)) int scale(int value, int by) {
    int scaled = value * by; /* HERE inlined */
    hidden_counter += scaled & 1;
    return scaled;
}

__attribute__((noipa)) static int area(const struct shape *s, word times) {
    int sum = 0;
    for (word i = 0; i < times; i++) {
        const point_t *p = &s->corners[i % 2][i % 3];
        int inner = scale(p->x, 3); /* HERE call */
        {
            long sum = inner + p->y; /* shadows the outer one */
            hidden_counter += (int)sum; /* HERE shadowed */
        }
        sum += inner; /* HERE loop */
    }

    /* no code on this line: HERE comment */

    return sum + visible_counter; /* HERE return */
}

__attribute__((noipa)) static double mixed(double d, float f, char c, uint8_t b, int64_t l, point_t by_value, void *p) {
    double product = d * f + c; /* HERE mixed */
    if (p == NULL)
        product += (double)b;
    return product + (double)l + by_value.x - by_value.y; /* HERE mixed-end */
}

__attribute__((noipa)) static int variadic(const char *format, ...) {
    return (int)strlen(format) + hidden_counter; /* HERE variadic */
}

__attribute__((noipa)) static void after_this(int unused) {
    (void)unused;
    visible_counter++; /* HERE after */
}

int main(int argc, char **argv) {
    first.corners[1][2] = (point_t){argc, 4};
    first.area = area;
    first.next = &first;
    int result = first.area(&first, 4); /* HERE main */
    result += scale(argc + 1, result); /* HERE second */
    double d = mixed(2.5, 1.5f, 'c', 200, -7, (point_t){1, 2}, argv);
    per_thread += variadic("%d", result);
    after_this(result);
    printf("%d %f %d %p %s %d %d\n", result, d, per_thread, (void *)nobody, greeting, (int)large, (int)tight.low);
    return 0;
}
