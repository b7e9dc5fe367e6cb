// Strings, references, inheritance, objects that are passed by pointer though they are written by value.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace shop {
enum class Colour : unsigned char { red, green = 7 };

struct Base {
    int id = 5;
    virtual ~Base() = default;
};

struct Tag {
    const char *text;
    short weight;
};

class Basket : public Base {
  public:
    std::string owner;
    Colour colour = Colour::green;
    double total = 2.5;

    __attribute__((noinline)) int add(const std::string &what, std::string_view where, Tag tag, Colour c);
};

int Basket::add(const std::string &what, std::string_view where, Tag tag, Colour c) {
    __asm__ volatile("" : : "r"(&what), "r"(this) : "memory");
    return (int)(what.size() + where.size()) + tag.weight - (int)c;
}

__attribute__((noinline)) std::string greet(std::string name, bool loud, float much) {
    __asm__ volatile("" : : "r"(&name), "x"(much) : "memory");
    return "hello " + name + (loud ? "!" : "");
}

__attribute__((noinline)) long count(std::unique_ptr<Basket> basket, long n) {
    __asm__ volatile("" : : "r"(&basket) : "memory");
    return basket->id * n;
}

__attribute__((noinline)) size_t stock(
    const std::vector<Tag> &tags, std::shared_ptr<Basket> shared, const std::shared_ptr<Basket> &none, long n,
    std::vector<std::string> words, const std::vector<double> &numbers, unsigned long this_one) {
    __asm__ volatile("" : : "r"(&shared), "r"(&tags), "r"(&none), "r"(&words), "r"(n), "r"(this_one) : "memory");
    return tags.size() + words.size() + numbers.size();
}
}

int main(int argc, char **) {
    shop::Basket basket;
    basket.owner = "a name that is much too long to be kept in place";
    std::string what = "lamp";
    long sum = basket.add(what, std::string_view("cellar").substr(0, 4), {"fragile", -3}, shop::Colour::red);
    sum += (long)shop::greet(argc > 1 ? "x" : "bob", true, 1.5f).size();
    sum += shop::count(std::make_unique<shop::Basket>(), -2);
    sum += (long)shop::stock({{"light", 1}, {"heavy", 900}}, std::make_shared<shop::Basket>(), nullptr, 2, {"first"}, {}, 1);
    std::printf("%ld\n", sum);
}
