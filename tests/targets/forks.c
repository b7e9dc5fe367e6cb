/* Children of every kind that call a probed function.
 *
 *   forks
 *   fork N | vfork N | spawn N | clone N | thread N    one child that calls N times; answers when it has ended
 *   call N             this process itself
 *   storm | calm       a thread that makes children of all kinds, 5 calls each, until calm
 *   hold N             forks a child that waits; answers its pid
 *   go                 the held child calls N times and ends
 *   count              begun= done= children= failed=    over all processes, in shared memory
 *
 * clone is CLONE_VM without CLONE_THREAD: a process of its own in the parent's address space.
 */
#include "target.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { BEGUN, DONE, CHILDREN, FAILED };
static counter *shared;
static int counters_fd = -1;
static _Atomic int storming;
extern char **environ;

PROBED long target_forks(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 5 + 2;
}

static void calls(long n, const char *s)
{
	for (long i = 0; i < n; i++) {
		atomic_fetch_add(&shared[BEGUN], 1);
		if (target_forks(i, s) != i * 5 + 2)
			atomic_fetch_add(&shared[FAILED], 1);
		atomic_fetch_add(&shared[DONE], 1);
	}
}

static void reap(pid_t pid)
{
	int status = -1;
	if (pid < 0)
		die("no child");
	while (waitpid(pid, &status, __WALL) < 0)
		if (errno != EINTR)
			die("waitpid");
	atomic_fetch_add(&shared[CHILDREN], 1);
	if (status) /* killed by a stray SIGTRAP, for example */
		atomic_fetch_add(&shared[FAILED], 1);
}

static void by_fork(long n)
{
	pid_t pid = fork();
	if (!pid) {
		calls(n, "fork");
		_exit(0);
	}
	reap(pid);
}

static void by_vfork(long n)
{
	pid_t pid = vfork();
	if (!pid) {
		calls(n, "vfork");
		_exit(0);
	}
	reap(pid);
}

static void by_spawn(long n)
{
	char fd[16], count[24];
	snprintf(fd, sizeof fd, "%d", counters_fd);
	snprintf(count, sizeof count, "%ld", n);
	char *argv[] = {"forks", "child", fd, count, NULL};
	pid_t pid = -1;
	errno = posix_spawn(&pid, "/proc/self/exe", NULL, NULL, argv, environ);
	reap(errno ? -1 : pid);
}

static int clone_main(void *arg)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* it calls for long in some tests, and must not go on in the next one */
	calls((long)arg, "clone");
	return 0;
}

static void by_clone(long n)
{
	char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (stack == MAP_FAILED)
		die("mmap of a stack");
	reap(clone(clone_main, stack + 65536, CLONE_VM | SIGCHLD, (void *)n));
	munmap(stack, 65536);
}

static void *thread_main(void *arg)
{
	calls((long)arg, "thread");
	return NULL;
}

static void by_thread(long n)
{
	pthread_t t;
	errno = pthread_create(&t, NULL, thread_main, (void *)n);
	if (errno)
		die("pthread_create");
	pthread_join(t, NULL);
}

static void *storm(void *arg)
{
	while (storming) {
		by_fork(5);
		by_vfork(5);
		by_spawn(5);
		by_clone(5);
		by_thread(5);
	}
	return arg;
}

int main(int argc, char **argv)
{
	char line[256];
	long n;
	pthread_t stormer;
	pid_t held = -1;
	int gate[2] = {-1, -1};
	if (argc == 4 && !strcmp(argv[1], "child")) {
		counters_fd = atoi(argv[2]);
		shared = shared_counters(&counters_fd);
		calls(atol(argv[3]), "spawn");
		return 0;
	}
	shared = shared_counters(&counters_fd);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "fork %ld", &n) == 1) {
			by_fork(n);
			say("ended");
		} else if (sscanf(line, "vfork %ld", &n) == 1) {
			by_vfork(n);
			say("ended");
		} else if (sscanf(line, "spawn %ld", &n) == 1) {
			by_spawn(n);
			say("ended");
		} else if (sscanf(line, "clone %ld", &n) == 1) {
			by_clone(n);
			say("ended");
		} else if (sscanf(line, "thread %ld", &n) == 1) {
			by_thread(n);
			say("ended");
		} else if (sscanf(line, "call %ld", &n) == 1) {
			calls(n, "main");
			say("called %ld", n);
		} else if (!strcmp(line, "storm")) {
			storming = 1;
			errno = pthread_create(&stormer, NULL, storm, NULL);
			if (errno)
				die("pthread_create");
			say("storming");
		} else if (!strcmp(line, "calm")) {
			storming = 0;
			pthread_join(stormer, NULL);
			say("calm");
		} else if (sscanf(line, "hold %ld", &n) == 1) {
			if (pipe(gate))
				die("pipe");
			held = fork();
			if (!held) {
				char c;
				close(gate[1]);
				if (read(gate[0], &c, 1) == 1)
					calls(n, "held");
				_exit(0);
			}
			close(gate[0]);
			say("held %d", held);
		} else if (!strcmp(line, "go")) {
			if (write(gate[1], "g", 1) != 1)
				die("write to the held child");
			close(gate[1]);
			reap(held);
			say("ended");
		} else if (!strcmp(line, "count")) {
			uint64_t d = shared[DONE], b = shared[BEGUN];
			say("count begun=%lu done=%lu children=%lu failed=%lu", b, d, (uint64_t)shared[CHILDREN],
			    (uint64_t)shared[FAILED]);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
