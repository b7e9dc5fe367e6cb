// Types, variables and lines of Go as debug information describes them; see shapes.c.
package main

import "fmt"

type point struct {
	X, Y int32
	Name string
}

type shape struct {
	point
	Corners [2][3]float64
	Tags    []string
	Next    *shape
	Any     interface{}
	ok      bool
}

var counter = 5

//go:noinline
func (s *shape) area(times int, label string) (sum int, err error) {
	for i := 0; i < times; i++ {
		sum += int(s.X) * i // HERE loop
	}
	counter += len(label)
	return sum + counter, nil // HERE return
}

func small(n int) int {
	return n*3 + 1 // HERE inlined
}

//go:noinline
func totals(numbers []int, scale float64) int {
	total := 0
	for _, n := range numbers {
		total += small(n) // HERE range
	}
	return int(float64(total) * scale) // HERE totals
}

func main() {
	s := &shape{point: point{3, 4, "corner"}, ok: true}
	s.Next = s
	sum, err := s.area(4, "label")
	fmt.Println(sum, err, totals([]int{1, 2, 3}, 1.5), s.Name)
}
