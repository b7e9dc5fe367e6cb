/* A 32-bit program without a library, so that it needs no 32-bit one. Build with -m32 -nostdlib -static and so on (see the
 * test). It maps the file it is given executable, as data: no other way leads 64-bit code into a 32-bit process. A line in
 * is a call of `target32` and a line out. */
__attribute__((noipa, used)) int target32(int i)
{
	__asm__ volatile("" : "+r"(i));
	return i + 32;
}

static long call(long number, long a, long b, long c)
{
	__asm__ volatile("int $0x80" : "+a"(number) : "b"(a), "c"(b), "d"(c) : "memory");
	return number;
}

__attribute__((used)) static void begin(long *stack)
{
	struct { unsigned long addr, len, prot, flags; long fd; unsigned long offset; } map = {0, 4096, 5, 2, -1, 0x1000};
	char c;
	map.fd = call(5, stack[2], 0, 0); /* open(argv[1], O_RDONLY) */
	if ((unsigned long)call(90, (long)&map, 0, 0) > -4096UL) /* mmap */
		call(1, 2, 0, 0);
	call(4, 1, (long)"ready\n", 6);
	while (call(3, 0, (long)&c, 1) == 1)
		if (c == '\n')
			call(4, 1, (long)(target32(1) == 33 ? "right\n" : "wrong\n"), 6);
	call(1, 0, 0, 0);
}

__asm__(".text\n.globl _start\n_start:\n  mov %esp, %eax\n  and $-16, %esp\n  sub $12, %esp\n  push %eax\n  call begin\n");
