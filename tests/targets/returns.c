/* Functions that return, or do not, in every way there is.
 *
 *   returns
 *   call N               target_ret, N times
 *   recurse N            target_rec, N deep
 *   jump N               target_jumper, left by longjmp, N times, from frames below target_frame
 *   deep N               target_deep, left by a longjmp of the compiler's from a stack that is N * 48 bytes deeper
 *   generated N          target_ret, called by code that was made at run time
 *   loop N               target_jumper through one pointer in a loop with setjmp, and target_quiet at the end of it
 *   tail N               target_tail jumps to target_ret
 *   mutual N             target_even and target_odd, in tail position, N times in all
 *   signal N             a handler calls target_ret, on its own stack and on the thread's, inside of target_raise
 *   coro N               N coroutines take turns inside of target_co
 *   migrate              a coroutine begins in one thread and returns in another
 *   fork                 target_fork forks inside; child and parent return
 *   vfork                the same with vfork, and the child calls target_ret
 *   exec                 target_exec becomes this program anew
 *   leave N              N threads end inside of target_leave
 *   threads T N          T threads call target_rec, 8 deep, N times
 *   callers N            target_ret from 64 places
 *   hold | go            target_hold, in a thread, until it is told to go on
 *   stack N              target_stack compares its stack, and its return address, with what they were the first time
 *   sleep NS             target_sleep
 *   fill TEXT            target_fill writes the text into its argument
 *   exit                 ends inside of target_exit
 *   count                calls= returns= left= wrong=
 */
#include "target.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/wait.h>
#include <ucontext.h>

static counter *shared;
#define CALLS shared[0]
#define RETURNS shared[1]
#define LEFT shared[2]
#define WRONG shared[3]
static int shared_fd = -1;
static jmp_buf back;

PROBED long target_ret(long i)
{
	CALLS++;
	__asm__ volatile("" : "+r"(i));
	RETURNS++;
	return i * 7 + 1;
}

PROBED long target_quiet(long i)
{
	__asm__ volatile("" : "+r"(i));
	return i;
}

PROBED long target_rec(long n)
{
	CALLS++;
	long below = n ? target_rec(n - 1) : 0;
	__asm__ volatile("" : "+r"(below));
	RETURNS++;
	return below + n;
}

PROBED long target_jumper(long i)
{
	CALLS++;
	LEFT++;
	longjmp(back, (int)(i & 1) + 1);
}

PROBED long target_frame(long i)
{
	CALLS++;
	LEFT++;
	long r = target_jumper(i);
	__asm__ volatile("" : "+r"(r));
	return r + 1;
}

static void *deep_back[5];

PROBED long target_deep(long i)
{
	CALLS++;
	LEFT++;
	__asm__ volatile("" : "+r"(i));
	__builtin_longjmp(deep_back, 1); /* not the C library's: nobody is told */
}

__attribute__((noinline)) static void from_depth(long depth)
{
	char *room = __builtin_alloca(depth * 48 + 16);
	__asm__ volatile("" : : "r"(room) : "memory");
	target_deep(depth);
}

__attribute__((noinline)) static void catch_from(long depth)
{
	if (!__builtin_setjmp(deep_back))
		from_depth(depth);
}

/* Leaves nothing of former calls on the stack. */
__attribute__((noinline)) static void wipe(void)
{
	char room[32768];
	memset(room, 0, sizeof room);
	__asm__ volatile("" : : "r"(room) : "memory");
}

static long call_generated(long i)
{
	static unsigned char *code;
	long (*target)(long) = target_ret;
	if (!code) {
		static const unsigned char text[] = {
			0x48, 0x83, 0xec, 0x08, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0, 0x48, 0x83, 0xc4, 0x08, 0xc3};
		code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (code == MAP_FAILED)
			die("code");
		memcpy(code, text, sizeof text);
		memcpy(code + 6, &target, 8);
	}
	long (*made)(long) = (long (*)(long))(void *)code;
	return made(i);
}

long target_tail(long i);
__asm__(".text\n.balign 16\n.globl target_tail\n.type target_tail, @function\ntarget_tail:\n"
	"  add $1, %rdi\n  jmp target_ret\n.size target_tail, .-target_tail\n");
/* target_odd(n) and target_even(n): jump to one another until n is 0. */
long target_even(long n);
long target_odd(long n);
__asm__(".text\n.balign 16\n.globl target_even\n.type target_even, @function\ntarget_even:\n"
	"  mov %rdi, %rax; sub $1, %rdi; js 1f; jmp target_odd\n1: ret\n.size target_even, .-target_even\n"
	".balign 16\n.globl target_odd\n.type target_odd, @function\ntarget_odd:\n"
	"  mov %rdi, %rax; sub $1, %rdi; js 1f; jmp target_even\n1: ret\n.size target_odd, .-target_odd\n");

static void on_signal(int number)
{
	if (target_ret(number) != number * 7 + 1)
		WRONG++;
}

PROBED long target_raise(long i)
{
	CALLS++;
	raise(SIGUSR1);
	raise(SIGUSR2);
	RETURNS++;
	return i;
}

#define MAX_CO 64
static ucontext_t scheduler, contexts[MAX_CO];
static char *stacks[MAX_CO];

PROBED long target_co(long i)
{
	CALLS++;
	for (int turn = 0; turn < 3; turn++)
		swapcontext(&contexts[i], &scheduler);
	RETURNS++;
	return i + 1;
}

static void coroutine(int i)
{
	if (target_co(i) != i + 1)
		WRONG++;
	swapcontext(&contexts[i], &scheduler);
}

static void begin(int i)
{
	if (!stacks[i] && !(stacks[i] = malloc(65536)))
		die("stack");
	getcontext(&contexts[i]);
	contexts[i].uc_stack.ss_sp = stacks[i];
	contexts[i].uc_stack.ss_size = 65536;
	contexts[i].uc_link = NULL;
	makecontext(&contexts[i], (void (*)(void))coroutine, 1, i);
}

static void *resume(void *arg)
{
	for (int turn = 0; turn < (int)(long)arg; turn++)
		swapcontext(&scheduler, &contexts[0]);
	return NULL;
}

PROBED long target_fork(long i)
{
	CALLS++;
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child)
		waitpid(child, NULL, 0);
	RETURNS++;
	return child ? i : -1;
}

PROBED long target_vfork(long i)
{
	CALLS++;
	pid_t child = vfork();
	if (child < 0)
		die("vfork");
	if (!child) {
		if (target_ret(i) != i * 7 + 1)
			WRONG++;
		_exit(0);
	}
	waitpid(child, NULL, 0);
	RETURNS++;
	return i;
}

PROBED long target_exec(char **argv)
{
	CALLS++;
	LEFT++;
	execv("/proc/self/exe", argv);
	die("exec");
}

PROBED long target_leave(long i)
{
	CALLS++;
	LEFT++;
	pthread_exit((void *)i);
}

static void *leaver(void *arg)
{
	return (void *)target_leave((long)arg);
}

static void *recurser(void *arg)
{
	for (long i = 0; i < (long)arg; i++)
		if (target_rec(7) != 28)
			WRONG++;
	return NULL;
}

static int gate[2];
static pthread_t held;

PROBED long target_hold(long i)
{
	char c;
	CALLS++;
	while (read(gate[0], &c, 1) < 0 && errno == EINTR)
		;
	RETURNS++;
	return i;
}

static void *holder(void *arg)
{
	(void)arg;
	if (target_hold(5) != 5)
		WRONG++;
	return NULL;
}

#define STACK_WORDS 64
static uintptr_t first_stack[STACK_WORDS], *at_first;

PROBED long target_stack(long i)
{
	uintptr_t *frame = (uintptr_t *)__builtin_frame_address(0) + 1; /* from the return address upwards */
	CALLS++;
	if (!at_first)
		memcpy(first_stack, frame, sizeof first_stack);
	else if (at_first != frame || memcmp(first_stack, frame, sizeof first_stack))
		WRONG++;
	at_first = frame;
	RETURNS++;
	return i;
}

/* The same words on the stack each time. */
__attribute__((noinline)) static void look(void)
{
	long local[STACK_WORDS];
	for (int i = 0; i < STACK_WORDS; i++)
		local[i] = i;
	__asm__ volatile("" : : "r"(local) : "memory");
	if (target_stack(3) != 3)
		WRONG++;
	for (int i = 0; i < STACK_WORDS; i++)
		if (local[i] != i)
			WRONG++;
}

PROBED long target_sleep(long ns)
{
	struct timespec t = {ns / 1000000000, ns % 1000000000};
	uint64_t start = now_ns();
	CALLS++;
	nanosleep(&t, NULL);
	RETURNS++;
	return (long)(now_ns() - start);
}

PROBED long target_fill(char *buffer, const char *text)
{
	CALLS++;
	strcpy(buffer, text);
	RETURNS++;
	return (long)strlen(text);
}

PROBED long target_exit(long i)
{
	CALLS++;
	LEFT++;
	_exit((int)i);
}

#define CALL1 if (target_ret(i) != i * 7 + 1) WRONG++; __asm__ volatile("" : "+r"(i));
#define CALL8 CALL1 CALL1 CALL1 CALL1 CALL1 CALL1 CALL1 CALL1
#define CALL64 CALL8 CALL8 CALL8 CALL8 CALL8 CALL8 CALL8 CALL8

int main(int argc, char **argv)
{
	char line[4096], ringtone[256];
	stack_t alternative = {.ss_sp = malloc(65536), .ss_size = 65536};
	struct sigaction on_own = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK}, on_same = {.sa_handler = on_signal};
	if (argc > 1)
		shared_fd = atoi(argv[1]);
	shared = shared_counters(&shared_fd);
	sigaltstack(&alternative, NULL);
	sigaction(SIGUSR1, &on_own, NULL);
	sigaction(SIGUSR2, &on_same, NULL);
	if (pipe(gate))
		die("pipe");
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		char word[32] = "", text[128] = "";
		volatile long n = 1;
		long m = 1;
		sscanf(line, "%31s %127s", word, text);
		sscanf(line, "%*s %ld %ld", &n, &m);
		if (!strcmp(word, "quit"))
			break;
		if (!strcmp(word, "count")) {
			say("count calls=%lu returns=%lu left=%lu wrong=%lu", (long)CALLS, (long)RETURNS, (long)LEFT, (long)WRONG);
			continue;
		}
		if (!strcmp(word, "call")) {
			for (long i = 0; i < n; i++)
				if (target_ret(i) != i * 7 + 1)
					WRONG++;
		} else if (!strcmp(word, "recurse")) {
			if (target_rec(n - 1) != n * (n - 1) / 2)
				WRONG++;
		} else if (!strcmp(word, "jump")) {
			for (volatile long i = 0; i < n; i++)
				if (!setjmp(back) && target_frame(i))
					WRONG++;
		} else if (!strcmp(word, "deep")) {
			catch_from(n);
			wipe();
		} else if (!strcmp(word, "generated")) {
			for (long i = 0; i < n; i++)
				if (call_generated(i) != i * 7 + 1)
					WRONG++;
		} else if (!strcmp(word, "loop")) {
			long (*volatile functions[2])(long) = {target_jumper, target_quiet};
			for (volatile long i = 0; i <= n; i++) {
				int which = i == n;
				if (!setjmp(back))
					functions[which](i);
			}
		} else if (!strcmp(word, "tail")) {
			for (long i = 0; i < n; i++)
				if (target_tail(i) != (i + 1) * 7 + 1)
					WRONG++;
		} else if (!strcmp(word, "mutual")) {
			if (target_even(n - 1) != 0)
				WRONG++;
		} else if (!strcmp(word, "signal")) {
			for (long i = 0; i < n; i++)
				if (target_raise(i) != i)
					WRONG++;
		} else if (!strcmp(word, "coro")) {
			for (int i = 0; i < n; i++)
				begin(i);
			for (int turn = 0; turn < 4; turn++)
				for (int i = 0; i < n; i++)
					swapcontext(&scheduler, &contexts[i]);
		} else if (!strcmp(word, "migrate")) {
			pthread_t other;
			begin(0);
			swapcontext(&scheduler, &contexts[0]);
			if (pthread_create(&other, NULL, resume, (void *)3))
				die("thread");
			pthread_join(other, NULL);
		} else if (!strcmp(word, "fork")) {
			if (target_fork(n) < 0)
				_exit(0);
		} else if (!strcmp(word, "vfork")) {
			if (target_vfork(n) != n)
				WRONG++;
		} else if (!strcmp(word, "exec")) {
			char number[16];
			char *again[] = {argv[0], number, NULL};
			snprintf(number, sizeof number, "%d", shared_fd);
			target_exec(again);
		} else if (!strcmp(word, "leave")) {
			for (long i = 0; i < n; i++) {
				pthread_t other;
				if (pthread_create(&other, NULL, leaver, (void *)i))
					die("thread");
				pthread_join(other, NULL);
			}
		} else if (!strcmp(word, "threads")) {
			pthread_t ids[256];
			for (long i = 0; i < n; i++)
				if (pthread_create(&ids[i], NULL, recurser, (void *)m))
					die("thread");
			for (long i = 0; i < n; i++)
				pthread_join(ids[i], NULL);
		} else if (!strcmp(word, "callers")) {
			for (long k = 0; k < n; k++) {
				long i = k;
				CALL64
			}
		} else if (!strcmp(word, "hold")) {
			long before = (long)CALLS;
			if (pthread_create(&held, NULL, holder, NULL))
				die("thread");
			while ((long)CALLS == before)
				sched_yield();
		} else if (!strcmp(word, "go")) {
			if (write(gate[1], "x", 1) != 1)
				die("write");
			pthread_join(held, NULL);
		} else if (!strcmp(word, "stack")) {
			for (long i = 0; i < n; i++)
				look();
		} else if (!strcmp(word, "sleep")) {
			say("slept %ld", target_sleep(n));
			continue;
		} else if (!strcmp(word, "fill")) {
			strcpy(ringtone, "before");
			if (target_fill(ringtone, text) != (long)strlen(text))
				WRONG++;
		} else if (!strcmp(word, "exit")) {
			target_exit(n);
		} else {
			say("what is `%s`?", word);
			continue;
		}
		say("%s done", word);
	}
	return 0;
}
