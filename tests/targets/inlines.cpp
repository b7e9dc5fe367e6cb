// Frames of functions that are inlined, in a namespace, a class and a template: target_leaf is called from
// shop::Order::total<long>, inlined into shop::twice, inlined into shop::pay; and from shop::refund.

#define PROBED __attribute__((noipa, noinline, used, visibility("default")))

extern "C" PROBED long target_leaf(long n)
{
	__asm__ volatile("" : "+r"(n));
	return n + 1;
}

namespace shop {

struct Order {
	long n;
	template <typename T> __attribute__((always_inline)) T total(T more) const
	{
		T sum = target_leaf(n + more);
		return sum * 3;
	}
};

static inline __attribute__((always_inline)) long twice(const Order &order)
{
	return 2 * order.total<long>(7);
}

__attribute__((noipa, noinline)) long pay(const Order *order, int)
{
	long r = twice(*order);
	__asm__ volatile("" : "+r"(r));
	return r + 5;
}

__attribute__((noipa, noinline)) long refund(long n)
{
	long r = target_leaf(n);
	__asm__ volatile("" : "+r"(r));
	return r - 5;
}

}

int main(int argc, char **)
{
	shop::Order order = {argc};
	return shop::pay(&order, 1) + shop::refund(2) == 0;
}
