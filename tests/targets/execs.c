/* A program that executes itself, or another, over and over.
 *
 *   execs
 *   call N             calls the probed function N times
 *   exec               executes itself from the leader; the new image prints "ready PID" again
 *   exec-thread        the same from another thread: the leader and all others vanish, the caller's tid becomes the pid
 *   storm N | storm-thread N    N images one after the other, 5 calls in each; the last prints "ready PID"
 *   other PROGRAM ARG...        executes another program in this process
 *   count              begun= done= images= wrong=    over all images
 */
#include "target.h"
#include <pthread.h>
#include <signal.h>

enum { BEGUN, DONE, IMAGES, WRONG };
static counter *shared;
static int counters_fd = -1;

PROBED long target_execs(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 7 + 3;
}

static void calls(long n)
{
	for (long i = 0; i < n; i++) {
		atomic_fetch_add(&shared[BEGUN], 1);
		if (target_execs(i, "execs") != i * 7 + 3)
			atomic_fetch_add(&shared[WRONG], 1);
		atomic_fetch_add(&shared[DONE], 1);
	}
}

static void exec_self(long left, int thread)
{
	char fd[16], count[24];
	snprintf(fd, sizeof fd, "%d", counters_fd);
	snprintf(count, sizeof count, "%ld", left);
	execl("/proc/self/exe", "execs", fd, count, thread ? "thread" : "leader", (char *)NULL);
	die("exec of itself");
}

static void *exec_main(void *left)
{
	exec_self((long)left, 1);
	return NULL;
}

static void *idle_main(void *arg)
{
	for (;;)
		pause();
	return arg;
}

/* Executes itself: by a second thread, with a third one idle, where that is asked for. */
static void again(long left, int thread)
{
	pthread_t t;
	if (!thread)
		exec_self(left, 0);
	if ((errno = pthread_create(&t, NULL, idle_main, NULL)) || (errno = pthread_create(&t, NULL, exec_main, (void *)left)))
		die("pthread_create");
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	char line[1024];
	long n, left = 0;
	if (argc == 4) {
		counters_fd = atoi(argv[1]);
		left = atol(argv[2]);
	}
	shared = shared_counters(&counters_fd);
	atomic_fetch_add(&shared[IMAGES], 1);
	if (left > 0) {
		calls(5);
		if (left > 1)
			again(left - 1, !strcmp(argv[3], "thread"));
	}
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %ld", &n) == 1) {
			calls(n);
			say("called %ld", n);
		} else if (!strcmp(line, "exec")) {
			again(0, 0);
		} else if (!strcmp(line, "exec-thread")) {
			again(0, 1);
		} else if (sscanf(line, "storm %ld", &n) == 1) {
			again(n, 0);
		} else if (sscanf(line, "storm-thread %ld", &n) == 1) {
			again(n, 1);
		} else if (!strncmp(line, "other ", 6)) {
			char *args[32], *save = NULL;
			int k = 0;
			for (char *w = strtok_r(line + 6, " ", &save); w && k < 31; w = strtok_r(NULL, " ", &save))
				args[k++] = w;
			args[k] = NULL;
			execv(args[0], args);
			say("failed %s", strerror(errno));
		} else if (!strcmp(line, "count")) {
			uint64_t d = shared[DONE], b = shared[BEGUN];
			say("count begun=%lu done=%lu images=%lu wrong=%lu", b, d, (uint64_t)shared[IMAGES],
			    (uint64_t)shared[WRONG]);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
