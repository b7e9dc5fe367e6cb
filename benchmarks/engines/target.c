/* What the engines' benchmarks probe.
 *
 *   call KIND THREADS N [TEXT]   THREADS threads call the function N times between them; answers the time it took
 *   fork N                       N children that wait; answers their pids
 *   work N                       N rounds of what a program does: computes, reads and writes a pipe, and forks now and then;
 *                                answers the CPU time that took
 *   count                        wrong= calls that returned something wrong
 *
 * KIND: `emulated` (its first instruction only moves the instruction pointer), `boosted` (it has to run from elsewhere), and
 * `returning` (as `boosted`, called from one place alone, so that a debugger can have a breakpoint behind the call).
 */
#include "target.h"
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

static counter wrong;

/* Written out, so that the first instruction does not depend on the compiler. */
__attribute__((naked, noipa, used)) long target_emulated(long i __attribute__((unused)), const char *s __attribute__((unused)))
{
	__asm__("endbr64; lea 1(%rdi,%rdi,2), %rax; ret");
}

__attribute__((naked, noipa, used)) long target_boosted(long i __attribute__((unused)), const char *s __attribute__((unused)))
{
	__asm__("push %rbp; mov %rsp, %rbp; lea 1(%rdi,%rdi,2), %rax; pop %rbp; ret");
}

PROBED long target_returning(long i, const char *s)
{
	return target_boosted(i, s) + 1;
}

static const struct kind {
	const char *name;
	long (*call)(long, const char *);
	long more;
} kinds[] = {{"emulated", target_emulated, 0}, {"boosted", target_boosted, 0}, {"returning", target_returning, 1}};

static const struct kind *kind;
static const char *text;
static unsigned long each;
static pthread_barrier_t begin, end;

static void calls(void)
{
	long bad = 0;
	for (unsigned long i = 0; i < each; i++)
		bad += kind->call((long)i, text) != (long)i * 3 + 1 + kind->more;
	atomic_fetch_add(&wrong, (uint64_t)bad);
}

static void *worker(void *arg)
{
	pthread_barrier_wait(&begin);
	calls();
	pthread_barrier_wait(&end);
	return arg;
}

static uint64_t run(unsigned threads)
{
	uint64_t t0;
	if (threads == 1) {
		t0 = now_ns();
		calls();
		return now_ns() - t0;
	}
	pthread_t ids[threads];
	pthread_barrier_init(&begin, NULL, threads + 1);
	pthread_barrier_init(&end, NULL, threads + 1);
	for (unsigned i = 0; i < threads; i++)
		if ((errno = pthread_create(&ids[i], NULL, worker, NULL)))
			die("pthread_create");
	pthread_barrier_wait(&begin);
	t0 = now_ns();
	pthread_barrier_wait(&end);
	t0 = now_ns() - t0;
	for (unsigned i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	pthread_barrier_destroy(&begin);
	pthread_barrier_destroy(&end);
	return t0;
}

static void children(unsigned long n)
{
	for (unsigned long i = 0; i < n; i++) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;)
				pause();
		}
		say("child %d", pid);
	}
	say("forked %lu", n);
}

/* CPU time of this process and its ended children: what else the machine does shows in it least. */
static uint64_t cpu_ns(void)
{
	uint64_t us = 0;
	for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
		struct rusage u;
		getrusage(who, &u);
		us += (uint64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000u + (uint64_t)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
	}
	return us * 1000u;
}

static uint64_t work(unsigned long rounds)
{
	int ends[2];
	char page[4096] = "";
	volatile uint64_t sum = 0;
	uint64_t t0 = cpu_ns();
	if (pipe(ends))
		die("pipe");
	for (unsigned long i = 0; i < rounds; i++) {
		for (int k = 0; k < 20000; k++)
			sum = sum * 6364136223846793005u + 1442695040888963407u;
		for (int k = 0; k < 20; k++)
			if (write(ends[1], page, sizeof page) < 0 || read(ends[0], page, sizeof page) < 0)
				die("pipe");
		if (i % 8 == 0) {
			void *map = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			memset(map, 1, 65536);
			munmap(map, 65536);
			pid_t pid = fork();
			if (!pid)
				_exit(0);
			if (pid < 0 || waitpid(pid, NULL, 0) < 0)
				die("fork");
		}
	}
	close(ends[0]);
	close(ends[1]);
	return cpu_ns() - t0;
}

int main(void)
{
	char line[512], name[32], words[256];
	unsigned long n;
	unsigned threads;
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		words[0] = 0;
		if (sscanf(line, "call %31s %u %lu %255[^\n]", name, &threads, &n, words) >= 3 && threads) {
			for (kind = kinds; kind < kinds + 2 && strcmp(kind->name, name); kind++)
				;
			text = words;
			each = n / threads;
			unsigned long ns = run(threads);
			say("called %lu ns=%lu", each * threads, ns);
		} else if (sscanf(line, "fork %lu", &n) == 1) {
			children(n);
		} else if (sscanf(line, "work %lu", &n) == 1) {
			say("worked %lu ns=%lu", n, (unsigned long)work(n));
		} else if (!strcmp(line, "count")) {
			say("count wrong=%lu", (uint64_t)wrong);
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
