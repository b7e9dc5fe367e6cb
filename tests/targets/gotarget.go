// Goroutines whose stacks grow, and move, inside of probed functions, and that change threads there.
//
//	gotarget
//	deep N      a new goroutine calls deep, N deep: its stack is copied several times on the way
//	yield N     N goroutines wait for one another inside of yielding
//	recover N   recovered calls panics, which panics; recovered recovers, and returns
//	count       calls= returns= left= wrong=
package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
)

var calls, returns, left, wrong int64

//go:noinline
func deep(n int) int {
	atomic.AddInt64(&calls, 1)
	var room [32]int
	room[n%32] = n
	if n > 0 {
		room[(n+1)%32] = deep(n - 1)
	}
	atomic.AddInt64(&returns, 1)
	return room[n%32] + room[(n+1)%32]
}

//go:noinline
func yielding(n int, gate *sync.WaitGroup) int {
	atomic.AddInt64(&calls, 1)
	gate.Done()
	gate.Wait()
	for i := 0; i < 5; i++ {
		runtime.Gosched()
	}
	grow(20)
	atomic.AddInt64(&returns, 1)
	return n + 1
}

//go:noinline
func grow(n int) int {
	var room [64]int
	room[n%64] = n
	if n > 0 {
		return grow(n-1) + room[n%64]
	}
	return room[0]
}

//go:noinline
func panics(n int) int {
	var room [256]int
	room[n%256] = n
	panic(room[n%256])
}

//go:noinline
func recovered(n int) (result int) {
	atomic.AddInt64(&calls, 1)
	defer func() {
		result = recover().(int) + 1
		atomic.AddInt64(&returns, 1)
	}()
	return panics(n)
}

func main() {
	runtime.GOMAXPROCS(4)
	fmt.Println("ready", os.Getpid())
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var word string
		n := 1
		fmt.Sscan(lines.Text(), &word, &n)
		switch word {
		case "quit":
			return
		case "deep":
			done := make(chan int)
			go func() { done <- deep(n) }()
			if <-done != n*(n+1)/2 {
				atomic.AddInt64(&wrong, 1)
			}
		case "yield":
			var gate, done sync.WaitGroup
			gate.Add(n)
			done.Add(n)
			for i := 0; i < n; i++ {
				go func(i int) {
					if yielding(i, &gate) != i+1 {
						atomic.AddInt64(&wrong, 1)
					}
					done.Done()
				}(i)
			}
			done.Wait()
		case "recover":
			for i := 0; i < n; i++ {
				if recovered(i%256) != i%256+1 {
					atomic.AddInt64(&wrong, 1)
				}
			}
		case "count":
			fmt.Printf("count calls=%d returns=%d left=%d wrong=%d\n", calls, returns, left, wrong)
			continue
		}
		fmt.Println(word, "done")
	}
}
