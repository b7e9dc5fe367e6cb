/* Programs that do what few do, and all may.
 *
 *   odd                the main thread obeys
 *   odd no-leader      another thread obeys, when the main thread has ended
 *   odd leader-leaves  another thread obeys; the main thread ends at `leave`
 *   call N             N calls of target_odd
 *   fault N            N calls of target_fault, whose first instruction faults; the handler jumps away
 *   undumpable         the process may be looked at by root alone from now on
 *   move               moves the page of target_moved to anonymous memory, in place, as large-page remappers do
 *   moved N            N calls of target_moved
 *   strict | filter    no system calls but read, write, exit from now on (seccomp; a filter answers others with an error)
 *   ids                uid= euid=
 *   no-privileges      no exec gives any from now on
 *   untraced N         has a child that asked not to be followed (CLONE_UNTRACED) call target_odd N times: status=
 *   hold N | go        the same, but the child waits for `go` first
 *   count              calls= faults= wrong=
 */
#include "target.h"
#include <pthread.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static counter calls, faults, wrong;
static sigjmp_buf before;
static _Atomic int leaving;
static pthread_t leader_thread;

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

/* Everything but read, write and exit is answered with EPERM. */
static void filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		die("seccomp");
}

static pid_t untraced(long n, int wait_for)
{
	char c;
	pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD | CLONE_UNTRACED, NULL, NULL, NULL, NULL);
	if (pid)
		return pid;
	if (wait_for >= 0 && read(wait_for, &c, 1) != 1)
		_exit(4);
	for (long i = 0; i < n; i++)
		if (target_odd(i, "untraced") != i * 17 + 6)
			_exit(5);
	_exit(0);
}

static int status_of(pid_t pid)
{
	int status = -1;
	waitpid(pid, &status, 0);
	return status;
}

static void *obey(void *leader)
{
	char line[256];
	long n;
	static pid_t held;
	static int gate[2];
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
		} else if (!strcmp(line, "leave")) {
			leaving = 1;
			pthread_join(leader_thread, NULL);
			say("left");
		} else if (!strcmp(line, "strict")) {
			if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
				die("seccomp");
			say("strict");
		} else if (!strcmp(line, "filter")) {
			filter();
			say("filter");
		} else if (!strcmp(line, "ids")) {
			say("ids uid=%d euid=%d", getuid(), geteuid());
		} else if (!strcmp(line, "no-privileges")) {
			prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
			say("no-privileges");
		} else if (sscanf(line, "untraced %ld", &n) == 1) {
			say("ended status=%d", status_of(untraced(n, -1)));
		} else if (sscanf(line, "hold %ld", &n) == 1) {
			if (pipe(gate))
				die("pipe");
			held = untraced(n, gate[0]);
			say("holds %d", held);
		} else if (!strcmp(line, "go")) {
			if (write(gate[1], "g", 1) != 1)
				die("go");
			say("ended status=%d", status_of(held));
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
	if (argc > 1 && !strcmp(argv[1], "leader-leaves")) {
		leader_thread = self;
		if ((errno = pthread_create(&worker, NULL, obey, NULL)))
			die("pthread_create");
		while (!leaving)
			usleep(1000);
		pthread_exit(NULL);
	}
	obey(NULL);
}
