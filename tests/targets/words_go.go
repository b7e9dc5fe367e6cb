// Go's strings, slices and structs, as parameters of its register ABI.
package main

import "fmt"

type point struct {
	X float64
	N int32
}

type user struct {
	Name string
	Age  int
	At   point
	Next *user
}

//go:noinline
func greet(name string, u *user, times int16, rate float64, loud bool) int {
	if loud {
		return len(name) + u.Age + int(times)
	}
	return -1
}

//go:noinline
func total(numbers []int64, p point) (int64, string) {
	var sum int64
	for _, n := range numbers {
		sum += n
	}
	return sum - int64(p.N), "done"
}

//go:noinline
func find(ages map[string]int, none map[int]bool, key string, users []user, name []byte) int {
	return ages[key] + len(none) + len(users) + len(name)
}

func main() {
	u := &user{Name: "alice", Age: 30, At: point{1.5, -4}, Next: &user{Name: "carol"}}
	a := greet("bob", u, -2, 0.25, true)
	b, s := total([]int64{10, 20, 30}, point{2.5, -7})
	ages := map[string]int{"alice": 30, "bob": 31, "carol": 32}
	fmt.Println(find(ages, nil, "bob", []user{{Name: "alice"}, {Name: "carol"}}, []byte("four")))
	fmt.Println(a, b, s)
}
