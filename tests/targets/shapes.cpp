// Types, variables and lines of C++ as debug information describes them; see shapes.c.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace outer {
namespace {
int anonymous_counter = 5;
}

enum class Mode : unsigned char { off, on = 7 };
enum Plain { minus = -1, zero };

struct Base {
    virtual ~Base() = default;
    int base_number = 11;
};
struct Other {
    long other_number = 12;
};
struct Virtual : virtual Base {
    int of_virtual = 1;
};

template <typename T> class Box : public Base, private Other {
  public:
    explicit Box(T t) : value(t) {}
    T doubled(int times) const;
    static int made;
    Mode mode = Mode::on;
    Plain plain = minus;
    bool flag : 1 = true;
    T value;
    T &ref = value;
    const char *(Box::*member)(int) = nullptr;
    class Inner {
      public:
        int depth = 3;
    } inner;
};
template <typename T> int Box<T>::made = 21;

template <typename T> __attribute__((noipa)) T Box<T>::doubled(int times) const {
    T sum = value + static_cast<T>(anonymous_counter); // HERE method
    for (int i = 0; i < times; i++)
        sum += value; // HERE method-loop
    made++;
    return sum;
}

inline __attribute__((always_inline)) int helper(int n) {
    int twice = n + n; // HERE inlined
    return twice ^ anonymous_counter;
}

__attribute__((noipa)) int by_reference(const std::string &text, std::vector<int> &&numbers, Box<int> &box) {
    int length = static_cast<int>(text.size()); // HERE reference
    int sum = helper(length) + box.doubled(2);
    for (int n : numbers) {
        sum += n; // HERE range
    }
    return sum;
}

__attribute__((noipa)) int overloaded(int i) { return i + 1; /* HERE int */ }
__attribute__((noipa)) int overloaded(double d) { return static_cast<int>(d) + 2; /* HERE double */ }
} // namespace outer

int main(int argc, char **) {
    outer::Box<int> box(argc);
    outer::Box<double> other(2.5);
    outer::Virtual v;
    int result = outer::by_reference("some text", {1, 2, 3}, box);
    result += static_cast<int>(other.doubled(1)) + outer::overloaded(1) + outer::overloaded(1.5) + v.base_number;
    auto lambda = [&](int more) {
        result += more; // HERE lambda
        return result;
    };
    std::printf("%d\n", lambda(outer::helper(argc)));
    return 0;
}
