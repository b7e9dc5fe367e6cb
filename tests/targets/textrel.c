/* A library that the loader changes the code of: dl.c opens it. Build with -shared -Wl,-z,notext, and without -fPIC.
 *
 * `dlfn` begins with an instruction that has an address in it, which is written there when the library is relocated; `inner`
 * does not, and is called by it each time. */
long dlfn(long i, const char *s);
long inner(long i);
__asm__(".data\n.local constant\nconstant: .quad 4\n"
	".text\n.globl dlfn\n.type dlfn, @function\ndlfn:\n"
	"  movabs $constant, %rax; mov (%rax), %rsi; jmp inner_local\n.size dlfn, .-dlfn\n"
	".globl inner\n.type inner, @function\ninner:\ninner_local:\n"
	"  imul $11, %rdi, %rax; add %rsi, %rax; ret\n.size inner, .-inner\n");
