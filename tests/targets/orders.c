/* What docs/expressions.md captures from: an order is handled once, with everything that a C program passes around.
 * argv[1]: how often. Prints what it knows of the calls itself. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum state { NEW, PAID = 3, SHIPPED };

struct item {
    const char *name;
    unsigned count;
    double price;
    struct item *next;
};

struct order {
    uint64_t id;
    enum state state;
    unsigned urgent : 1, priority : 3;
    int8_t retries;
    bool gift;
    char code[8];
    struct item *items;
    int history[4];
    union {
        const char *note;
        uint64_t number;
    };
    struct order *previous;
};

struct money {
    double amount;
    long currency;
};

long handled = 0;
_Thread_local int delivered;
static _Thread_local long distance = -7;
static struct order first = {.id = 41, .state = NEW, .code = "a-41"};
const char *password = "hunter2";

__attribute__((noinline, noclone)) int handle(struct order *order, int attempt, double rate, const char *user) {
    handled++;
    __asm__ volatile("" : : "r"(order), "r"(user), "x"(rate), "r"(attempt) : "memory");
    return attempt > 1 ? -1 : (int)order->id;
}

__attribute__((noinline, noclone)) struct money pay(struct money total, char sign, const char *token) {
    __asm__ volatile("" : : "r"(token) : "memory");
    return (struct money){total.amount * 2, sign == '-' ? -total.currency : total.currency};
}

__attribute__((noinline, noclone)) double weigh(float kilos, long a, long b, long c, long d, long e, long f, long g) {
    __asm__ volatile("" : : : "memory");
    return kilos + (double)(a + b + c + d + e + f + g);
}

__attribute__((noinline, noclone)) const char *name_of(const struct item *item) {
    __asm__ volatile("" : : "r"(item) : "memory");
    return item ? item->name : NULL;
}

__attribute__((noinline, noclone)) void deliver(
    struct order *order, const struct sockaddr *to, struct in_addr by, const struct in6_addr *via, void (*done)(void)) {
    delivered++;
    distance++;
    __asm__ volatile("" : : "r"(order), "r"(to), "r"(by), "r"(via), "r"(done) : "memory");
}

void arrived(void) {}

int main(int argc, char **argv) {
    int times = argc > 1 ? atoi(argv[1]) : 1;
    struct item lamp = {"lamp", 2, 19.5, NULL}, book = {"book", 1, 7.25, &lamp};
    struct order order = {
        .id = 42, .state = PAID, .urgent = 1, .priority = 5, .retries = -2, .gift = true, .code = "b-42",
        .items = &book, .history = {3, 1, 4, 1}, .note = "by noon", .previous = &first,
    };
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(80), .sin_addr = {htonl(0xc6336407)}};
    long sum = 0;
    for (int i = 1; i <= times; i++) {
        sum += handle(&order, i, 0.19, "alice");
        sum += pay((struct money){12.5, 978}, '-', "s3cret").currency;
        sum += (long)weigh(1.5f, 1, 2, 3, 4, 5, 6, -7);
        deliver(&order, (struct sockaddr *)&to, (struct in_addr){htonl(0xc0000205)}, &in6addr_loopback, arrived);
        sum += name_of(i % 2 ? &book : NULL) != NULL;
    }
    printf("%ld %ld\n", handled, sum);
    return 0;
}
