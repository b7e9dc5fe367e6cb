/* Threads that fork, run and block while one opens and closes a library.
 *
 *   busy LIBRARY       20 times: opens it, calls `dlfn` twice, closes it; then prints "interrupted N calls N wrong N"
 *
 * `interrupted` counts system calls that ended with EINTR, though no signal was sent.
 */
#include "target.h"
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/wait.h>

static _Atomic int running = 1;
static counter interrupted, children;

static void *forks(void *arg)
{
	while (running) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (!pid)
			_exit(0);
		int status;
		if (waitpid(pid, &status, 0) != pid || status)
			die("child ended with %x", status);
		atomic_fetch_add(&children, 1);
	}
	return arg;
}

static void *blocks(void *arg)
{
	int fd = epoll_create1(0);
	while (running) {
		struct epoll_event event;
		if (epoll_wait(fd, &event, 1, 20) < 0 && errno == EINTR)
			atomic_fetch_add(&interrupted, 1);
	}
	return arg;
}

static void *spins(void *arg)
{
	while (running)
		__asm__ volatile("pause");
	return arg;
}

int main(int argc, char **argv)
{
	pthread_t threads[3];
	void *(*mains[3])(void *) = { forks, blocks, spins };
	long calls = 0, wrong = 0;
	sigset_t quiet;
	if (argc != 2)
		return 2;
	/* The end of a child is no news to a thread that waits for something else, but to a traced one it would be: the kernel
	 * tells a tracer of signals that are ignored, and that ends an epoll_wait (kernel/signal.c, sig_ignored). */
	sigemptyset(&quiet);
	sigaddset(&quiet, SIGCHLD);
	sigprocmask(SIG_BLOCK, &quiet, NULL);
	for (int i = 0; i < 3; i++)
		if ((errno = pthread_create(&threads[i], NULL, mains[i], NULL)))
			die("pthread_create");
	while (!children)
		;
	for (int i = 0; i < 20; i++) {
		void *handle = dlopen(argv[1], RTLD_NOW);
		long (*f)(long, const char *) = handle ? (long (*)(long, const char *))dlsym(handle, "dlfn") : NULL;
		if (!f) {
			fprintf(stderr, "%s\n", dlerror());
			return 2;
		}
		for (int k = 0; k < 2; k++, calls++)
			wrong += f(k, "busy") != k * 11 + 4;
		dlclose(handle);
	}
	running = 0;
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	say("interrupted %lu calls %ld wrong %ld", (uint64_t)interrupted, calls, wrong);
	return 0;
}
