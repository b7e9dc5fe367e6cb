/* Programs that do what few do, and all may.
 *
 *   odd                the main thread obeys
 *   odd no-leader      another thread obeys, when the main thread has ended
 *   call N             N calls of target_odd
 *   fault N            N calls of target_fault, whose first instruction faults; the handler jumps away
 *   undumpable         the process may be looked at by root alone from now on
 *   move               moves the page of target_moved to anonymous memory, in place, as large-page remappers do
 *   moved N            N calls of target_moved
 *   count              calls= faults= wrong=
 */
#include "target.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/prctl.h>

static counter calls, faults, wrong;
static sigjmp_buf before;

PROBED long target_odd(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 17 + 6;
}

long target_fault(const long *p);
long target_moved(long i);
__asm__(".text\n.globl target_fault\n.type target_fault, @function\ntarget_fault:\n"
	"  mov (%rdi), %rax; ret\n.size target_fault, .-target_fault\n"
	".balign 4096\n.globl target_moved\n.type target_moved, @function\ntarget_moved:\n"
	"  lea 7(%rdi,%rdi,2), %rax; ret\n.size target_moved, .-target_moved\n.balign 4096\n");

static void on_fault(int number)
{
	(void)number;
	atomic_fetch_add(&faults, 1);
	siglongjmp(before, 1);
}

static void *obey(void *leader)
{
	char line[256];
	long n;
	if (leader)
		pthread_join(*(pthread_t *)leader, NULL);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %ld", &n) == 1) {
			for (long i = 0; i < n; i++, calls++)
				if (target_odd(i, "odd") != i * 17 + 6)
					wrong++;
			say("called %ld", n);
		} else if (sscanf(line, "fault %ld", &n) == 1) {
			for (volatile long i = 0; i < n; i++)
				if (!sigsetjmp(before, 1)) {
					target_fault(NULL);
					wrong++;
				}
			say("faulted %ld", n);
		} else if (sscanf(line, "moved %ld", &n) == 1) {
			for (long i = 0; i < n; i++, calls++)
				if (target_moved(i) != i * 3 + 7)
					wrong++;
			say("called %ld", n);
		} else if (!strcmp(line, "undumpable")) {
			prctl(PR_SET_DUMPABLE, 0);
			say("undumpable");
		} else if (!strcmp(line, "move")) {
			char *copy = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			memcpy(copy, (void *)target_moved, 4096);
			if (mprotect(copy, 4096, PROT_READ | PROT_EXEC) ||
			    mremap(copy, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)target_moved) == MAP_FAILED)
				die("move");
			say("moved");
		} else if (!strcmp(line, "count")) {
			say("count calls=%lu faults=%lu wrong=%lu", (uint64_t)calls, (uint64_t)faults, (uint64_t)wrong);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			_exit(0);
		} else {
			say("unknown %s", line);
		}
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	static pthread_t self;
	pthread_t worker;
	struct sigaction action = {.sa_handler = on_fault};
	sigaction(SIGSEGV, &action, NULL);
	self = pthread_self();
	if (argc > 1 && !strcmp(argv[1], "no-leader")) {
		if ((errno = pthread_create(&worker, NULL, obey, &self)))
			die("pthread_create");
		pthread_exit(NULL);
	}
	obey(NULL);
}
