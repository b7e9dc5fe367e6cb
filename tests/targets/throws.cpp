// Exceptions that are thrown through probed functions.
//
//   throws
//   throw N              target_between calls target_throw, which throws; caught above both; target_cleanup runs on the way
//   swallow N            target_throw, caught by who called it, who then goes on as if it had returned
//   call N               target_between, which returns
//   count                caught= cleaned= returns= left= wrong=
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unistd.h>

#define PROBED extern "C" __attribute__((noipa, noinline, used, visibility("default")))

static long caught, cleaned, returns, left, wrong;

PROBED long target_cleanup(long i)
{
	__asm__ volatile("" : "+r"(i));
	cleaned++;
	returns++;
	return i;
}

struct Guard {
	~Guard() { target_cleanup(1); }
};

PROBED long target_throw(long i)
{
	left++;
	throw std::runtime_error(std::to_string(i));
}

PROBED long target_between(long i, bool throws)
{
	if (!throws) {
		returns++;
		return i + 1;
	}
	left++;
	Guard guard;
	return target_throw(i) + 1;
}

int main()
{
	char line[256];
	setvbuf(stdout, nullptr, _IOLBF, 0);
	printf("ready %d\n", getpid());
	while (fgets(line, sizeof line, stdin)) {
		char word[32] = "";
		long n = 1;
		sscanf(line, "%31s %ld", word, &n);
		if (!strcmp(word, "quit"))
			break;
		if (!strcmp(word, "throw")) {
			for (long i = 0; i < n; i++) {
				try {
					target_between(i, true);
					wrong++;
				} catch (const std::runtime_error &e) {
					caught++;
					wrong += std::stol(e.what()) != i;
				}
			}
		} else if (!strcmp(word, "swallow")) {
			for (long i = 0; i < n; i++) {
				try {
					target_throw(i);
				} catch (...) {
					caught++;
				}
			}
		} else if (!strcmp(word, "call")) {
			for (long i = 0; i < n; i++)
				wrong += target_between(i, false) != i + 1;
		} else if (!strcmp(word, "count")) {
			printf("count caught=%ld cleaned=%ld returns=%ld left=%ld wrong=%ld\n", caught, cleaned, returns, left, wrong);
			continue;
		}
		printf("%s done\n", word);
	}
}
