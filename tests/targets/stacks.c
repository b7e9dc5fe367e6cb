/* A function that is reached by all kinds of frames.
 *
 *   deep N       N calls of target_down inside of one another
 *   sort         from qsort's callback
 *   signal       from a signal handler, whose signal came while target_raise made a system call
 *   fault        from the handler of a fault, in target_fault
 *   other        as `signal`, on a signal stack of its own
 *   realign      from a function whose stack is aligned to 64 bytes, and has an array of variable length
 *   thread       from a thread's first function
 *   spin N C     C calls, N calls of target_spin deep; answers the time they took
 *   count        here=
 *
 * With arguments it obeys those instead of standard input.
 */
#include "target.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

static long here, wrong;
static sigjmp_buf back;
static volatile long sink;
static int leaf_clock;

PROBED long target_here(long i)
{
	here++;
	if (leaf_clock) {
		struct timespec t;
		clock_gettime(CLOCK_MONOTONIC, &t);
		sink += t.tv_nsec;
	}
	__asm__ volatile("" : "+r"(i));
	return i + 1;
}

PROBED long target_down(long n)
{
	long r = n > 1 ? target_down(n - 1) : target_here(n);
	__asm__ volatile("" : "+r"(r));
	return r + 1;
}

PROBED uint64_t target_spin(long depth, long calls)
{
	uint64_t r;
	if (depth > 1) {
		r = target_spin(depth - 1, calls);
	} else {
		uint64_t begun = now_ns();
		for (long i = 0; i < calls; i++)
			sink += target_here(i);
		r = now_ns() - begun;
	}
	__asm__ volatile("" : "+r"(r));
	return r;
}

static int compare(const void *a, const void *b)
{
	int x = *(const int *)a, y = *(const int *)b;
	sink += target_here(x);
	return (x > y) - (x < y);
}

PROBED void target_sort(void)
{
	int values[] = {3, 1, 2, 9, 7};
	qsort(values, 5, sizeof *values, compare);
	wrong += values[0] != 1 || values[4] != 9;
}

static void handler(int number)
{
	sink += target_here(number);
	if (number == SIGSEGV)
		siglongjmp(back, 1);
}

PROBED void target_raise(void)
{
	raise(SIGUSR1);
	__asm__ volatile("");
}

PROBED void target_fault(volatile int *where)
{
	*where = 1;
	__asm__ volatile("");
}

PROBED long target_realign(long n)
{
	char wide[64] __attribute__((aligned(64)));
	char array[n];
	memset(wide, 1, sizeof wide);
	memset(array, 2, (size_t)n);
	__asm__ volatile("" : : "r"(wide), "r"(array) : "memory");
	wrong += (uintptr_t)wide % 64 != 0;
	return target_here(n) + wide[3] + array[n - 1];
}

static void *run(void *argument)
{
	sink += target_here((long)argument);
	return NULL;
}

static void obey(const char *line)
{
	long n = 1, calls = 1;
	char word[32] = "";
	sscanf(line, "%31s %ld %ld", word, &n, &calls);
	if (!strcmp(word, "spin")) {
		say("spin ns=%llu", (unsigned long long)target_spin(n, calls));
		return;
	} else if (!strcmp(word, "deep")) {
		sink += target_down(n);
	} else if (!strcmp(word, "sort")) {
		target_sort();
	} else if (!strcmp(word, "signal") || !strcmp(word, "other")) {
		static char stack[1 << 16];
		stack_t own = {.ss_sp = stack, .ss_size = sizeof stack};
		struct sigaction action = {.sa_handler = handler, .sa_flags = *word == 'o' ? SA_ONSTACK : 0};
		sigaltstack(&own, NULL);
		sigaction(SIGUSR1, &action, NULL);
		target_raise();
	} else if (!strcmp(word, "fault")) {
		struct sigaction action = {.sa_handler = handler, .sa_flags = 0};
		sigaction(SIGSEGV, &action, NULL);
		if (!sigsetjmp(back, 1))
			target_fault(NULL);
	} else if (!strcmp(word, "realign")) {
		sink += target_realign(n < 100 ? 100 : n);
	} else if (!strcmp(word, "thread")) {
		pthread_t thread;
		pthread_create(&thread, NULL, run, (void *)n);
		pthread_join(thread, NULL);
	} else if (!strcmp(word, "clock")) {
		leaf_clock = 1;
		sink += target_down(3);
		leaf_clock = 0;
	} else if (!strcmp(word, "count")) {
		say("count here=%ld wrong=%ld", here, wrong);
		return;
	}
	say("%s done", word);
}

int main(int argc, char **argv)
{
	char line[256];
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 1) {
		for (int i = 1; i < argc; i++)
			obey(argv[i]);
		return 0;
	}
	say("ready %d", getpid());
	while (read_line(line, sizeof line) && strcmp(line, "quit"))
		obey(line);
	return 0;
}
