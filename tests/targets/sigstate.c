/* Programs with an opinion about SIGTRAP.
 *
 *   sigstate default | handler | ignored | blocked | blocked-handler
 *   call N             N calls of the probed function
 *   trap N             runs an int3 of its own N times (mode handler only: elsewhere it would end the program)
 *   raise N            raises SIGTRAP N times (modes handler and ignored; when blocked one stays pending)
 *   state              action= (default, ignored, ours, other) blocked= pending=, as the kernel says
 *   count              calls= wrong= traps= raised= strange=   (strange: a handler call that is neither)
 */
#include "target.h"
#include <signal.h>
#include <ucontext.h>

static counter calls, wrong, traps, raised, strange;
extern char own_int3_after[];

PROBED long target_sigstate(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 13 + 5;
}

__attribute__((noipa)) static void own_int3(void)
{
	__asm__ volatile("int3\n.globl own_int3_after\nown_int3_after:" ::: "memory");
}

static void on_trap(int number, siginfo_t *si, void *context)
{
	uintptr_t rip = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
	(void)number;
	if (si->si_code == SI_KERNEL && rip == (uintptr_t)own_int3_after)
		atomic_fetch_add(&traps, 1);
	else if (si->si_code == SI_TKILL && si->si_pid == getpid())
		atomic_fetch_add(&raised, 1);
	else
		atomic_fetch_add(&strange, 1);
}

static void say_state(void)
{
	struct sigaction action;
	sigset_t mask, pending;
	sigaction(SIGTRAP, NULL, &action);
	sigprocmask(SIG_BLOCK, NULL, &mask);
	sigpending(&pending);
	const char *text = action.sa_flags & SA_SIGINFO && action.sa_sigaction == on_trap ? "ours"
			   : action.sa_handler == SIG_DFL ? "default"
			   : action.sa_handler == SIG_IGN ? "ignored"
							  : "other";
	say("state action=%s blocked=%d pending=%d", text, sigismember(&mask, SIGTRAP), sigismember(&pending, SIGTRAP));
}

int main(int argc, char **argv)
{
	char line[256];
	long n;
	const char *mode = argc == 2 ? argv[1] : "default";
	struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTRAP);
	if (strstr(mode, "handler"))
		sigaction(SIGTRAP, &action, NULL);
	if (!strcmp(mode, "ignored"))
		signal(SIGTRAP, SIG_IGN);
	if (strstr(mode, "blocked"))
		sigprocmask(SIG_BLOCK, &set, NULL);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %ld", &n) == 1) {
			for (long i = 0; i < n; i++) {
				if (target_sigstate(i, mode) != i * 13 + 5)
					wrong++;
				calls++;
			}
			say("called %ld", n);
		} else if (sscanf(line, "trap %ld", &n) == 1) {
			for (long i = 0; i < n; i++)
				own_int3();
			say("trapped %ld", n);
		} else if (sscanf(line, "raise %ld", &n) == 1) {
			for (long i = 0; i < n; i++)
				raise(SIGTRAP);
			say("raised %ld", n);
		} else if (!strcmp(line, "state")) {
			say_state();
		} else if (!strcmp(line, "count")) {
			say("count calls=%lu wrong=%lu traps=%lu raised=%lu strange=%lu", (uint64_t)calls, (uint64_t)wrong,
			    (uint64_t)traps, (uint64_t)raised, (uint64_t)strange);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
