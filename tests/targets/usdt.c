/* A USDT probe that is skipped while nobody looks at it: two places, one semaphore.
 *
 *   usdt
 *   call N             N times through both places; the probe's argument is worked out only where the semaphore says so
 *   fork N | vfork N | clone N    a child that does so, and answers when it has ended
 *   thread N           a thread that does so
 *   hold | go N        forks a child that waits, and answers its pid; it goes on, as above
 *   storm N | calm     a thread that forks N children, which wait until calm, and end; it answers left=, how many of them had
 *                      a semaphore other than that of this process then
 *   exec               execs itself
 *   semaphore          what it is: semaphore=
 *   lift D             adds D to it, as another tool would
 *   replace | protect  maps other memory, full of 7, over it; makes its page read-only
 *   count              calls= evaluated= semaphore= (of who was last to count: a child too) failed=
 *
 * Built with -DLIBRARY -shared -fPIC it is a library with the function `dlfn` for dl.c, which returns a wrong result where the
 * probe is skipped.
 */
#include "target.h"
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <pthread.h>

/* A page of its own, so that it can be taken away. Not zero at first, so that it is in the file. */
__attribute__((section(".probes"), used, aligned(4096), visibility("hidden"))) volatile struct {
	unsigned short counter, rest[2047];
} shop_sold_semaphore = {0, {1}};

/* What SystemTap's sys/sdt.h makes of STAP_PROBE1(shop, sold, x). */
#define NOTE(X) __asm__ volatile( \
	"990: nop\n.pushsection .note.stapsdt,\"\",\"note\"\n.balign 4\n.4byte 992f-991f, 994f-993f, 3\n" \
	"991: .asciz \"stapsdt\"\n992: .balign 4\n993: .8byte 990b\n.8byte _.stapsdt.base\n.8byte shop_sold_semaphore\n" \
	".asciz \"shop\"\n.asciz \"sold\"\n.asciz \"-8@%0\"\n994: .balign 4\n.popsection\n" \
	".ifndef _.stapsdt.base\n.pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n.weak _.stapsdt.base\n" \
	".hidden _.stapsdt.base\n_.stapsdt.base: .space 1\n.size _.stapsdt.base, 1\n.popsection\n.endif\n" \
	: : "r"(X))

#ifdef LIBRARY

PROBED long dlfn(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	if (!shop_sold_semaphore.counter)
		return -1;
	NOTE(i);
	return i * 11 + 4;
}

#else

enum { CALLS, EVALUATED, SEMAPHORE, FAILED };
static counter *shared;
static int counters_fd = -1;

static long evaluate(long i)
{
	atomic_fetch_add(&shared[EVALUATED], 1);
	return i;
}

PROBED void sell(long i)
{
	if (shop_sold_semaphore.counter) {
		long x = evaluate(i);
		NOTE(x);
	}
}

PROBED void sell_again(long i)
{
	if (shop_sold_semaphore.counter) {
		long x = evaluate(i);
		NOTE(x);
	}
}

static void calls(long n)
{
	for (long i = 0; i < n; i++) {
		sell(i);
		sell_again(i);
	}
	atomic_fetch_add(&shared[CALLS], n);
	shared[SEMAPHORE] = shop_sold_semaphore.counter;
}

static void reap(pid_t pid)
{
	int status = -1;
	while (pid < 0 || waitpid(pid, &status, __WALL) < 0)
		if (errno != EINTR)
			die("no child");
	if (status)
		atomic_fetch_add(&shared[FAILED], 1);
}

static void by_vfork(long n)
{
	pid_t pid = vfork();
	if (!pid) {
		calls(n);
		_exit(0);
	}
	reap(pid);
}

static int clone_main(void *arg)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	calls((long)arg);
	return 0;
}

static void *thread_main(void *arg)
{
	calls((long)arg);
	return NULL;
}

enum { MOST = 512 };
static pid_t crowd[MOST];
static int doors[2] = {-1, -1};

static void *storm(void *arg)
{
	for (long i = 0; i < (long)arg; i++) {
		crowd[i] = fork();
		if (!crowd[i]) {
			unsigned short expected;
			close(doors[1]);
			if (read(doors[0], &expected, sizeof expected) != sizeof expected)
				_exit(2);
			_exit(shop_sold_semaphore.counter != expected);
		}
	}
	return NULL;
}

static int calm(long n)
{
	int left = 0, status = -1;
	for (long i = 0; i < n; i++)
		if (write(doors[1], (void *)&shop_sold_semaphore.counter, 2) != 2)
			die("write to the crowd");
	close(doors[0]);
	close(doors[1]);
	for (long i = 0; i < n; i++) {
		if (crowd[i] < 0 || waitpid(crowd[i], &status, 0) < 0)
			die("no child");
		left += WIFEXITED(status) && WEXITSTATUS(status) == 1;
		if (!WIFEXITED(status))
			atomic_fetch_add(&shared[FAILED], 1);
	}
	return left;
}

int main(int argc, char **argv)
{
	char line[256], fd[16];
	long n, many = 0;
	pthread_t stormer;
	pid_t held = -1;
	int gate[2] = {-1, -1};
	if (argc > 1)
		counters_fd = atoi(argv[1]);
	shared = shared_counters(&counters_fd);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %ld", &n) == 1) {
			calls(n);
			say("called %ld", n);
		} else if (sscanf(line, "fork %ld", &n) == 1) {
			pid_t pid = fork();
			if (!pid)
				_exit(clone_main((void *)n));
			reap(pid);
			say("ended");
		} else if (sscanf(line, "vfork %ld", &n) == 1) {
			by_vfork(n);
			say("ended");
		} else if (sscanf(line, "clone %ld", &n) == 1) {
			char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			if (stack == MAP_FAILED)
				die("mmap of a stack");
			reap(clone(clone_main, stack + 65536, CLONE_VM | SIGCHLD, (void *)n));
			munmap(stack, 65536);
			say("ended");
		} else if (sscanf(line, "thread %ld", &n) == 1) {
			pthread_t t;
			errno = pthread_create(&t, NULL, thread_main, (void *)n);
			if (errno)
				die("pthread_create");
			pthread_join(t, NULL);
			say("ended");
		} else if (!strcmp(line, "hold")) {
			if (pipe(gate))
				die("pipe");
			held = fork();
			if (!held) {
				close(gate[1]);
				if (read(gate[0], &n, sizeof n) == sizeof n)
					calls(n);
				_exit(0);
			}
			close(gate[0]);
			say("held %d", held);
		} else if (sscanf(line, "go %ld", &n) == 1) {
			if (write(gate[1], &n, sizeof n) != sizeof n)
				die("write to the held child");
			close(gate[1]);
			reap(held);
			say("ended");
		} else if (sscanf(line, "storm %ld", &many) == 1 && many <= MOST) {
			if (pipe(doors))
				die("pipe");
			errno = pthread_create(&stormer, NULL, storm, (void *)many);
			if (errno)
				die("pthread_create");
			say("storming");
		} else if (!strcmp(line, "calm")) {
			pthread_join(stormer, NULL);
			say("left=%d", calm(many));
		} else if (!strcmp(line, "exec")) {
			snprintf(fd, sizeof fd, "%d", counters_fd);
			execl("/proc/self/exe", "usdt", fd, NULL);
			die("exec");
		} else if (!strcmp(line, "semaphore")) {
			say("semaphore=%u", (unsigned)shop_sold_semaphore.counter);
		} else if (sscanf(line, "lift %ld", &n) == 1) {
			shop_sold_semaphore.counter = (unsigned short)(shop_sold_semaphore.counter + n);
			say("lifted");
		} else if (!strcmp(line, "replace")) {
			void *page = mmap((void *)&shop_sold_semaphore, 4096, PROT_READ | PROT_WRITE,
					  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			if (page == MAP_FAILED)
				die("mmap over the semaphore");
			memset(page, 7, 4096);
			say("replaced");
		} else if (!strcmp(line, "protect")) {
			if (mprotect((void *)&shop_sold_semaphore, 4096, PROT_READ))
				die("mprotect");
			say("protected");
		} else if (!strcmp(line, "count")) {
			say("count calls=%lu evaluated=%lu semaphore=%lu failed=%lu", (uint64_t)shared[CALLS],
			    (uint64_t)shared[EVALUATED], (uint64_t)shared[SEMAPHORE], (uint64_t)shared[FAILED]);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}

#endif
