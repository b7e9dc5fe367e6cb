// Functions that are reached while an exception is on its way: a destructor in the unwinder's second phase, and a catch.
//
//   throwing            prints what it caught, and ends
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#define PROBED extern "C" __attribute__((noipa, noinline, used, visibility("default")))

static long here;

PROBED void target_cleanup(long i)
{
	__asm__ volatile("" : "+r"(i));
	here += i;
}

PROBED void target_caught(const char *what)
{
	std::puts(what);
}

struct Guard {
	std::string name;
	explicit Guard(std::string n) : name(std::move(n)) {}
	~Guard() { target_cleanup((long)name.size()); }
};

template <typename T> static void __attribute__((noinline)) thrower(const std::vector<T> &values)
{
	Guard guard("inner");
	if (values.at(1) == 7)
		throw std::runtime_error("seven");
	target_cleanup(0);
}

struct Base {
	virtual ~Base() = default;
	virtual void run() = 0;
};

struct Derived : Base {
	void run() override
	{
		Guard guard("outer");
		thrower(std::vector<int>{1, 7});
	}
};

int main()
{
	Base *base = new Derived;
	try {
		base->run();
	} catch (const std::exception &e) {
		target_caught(e.what());
	}
	delete base;
}
