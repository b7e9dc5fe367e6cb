/* The library that dl.c opens and closes. Build with -shared -fPIC. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

__attribute__((noipa, noinline, visibility("default"))) long dlfn(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 11 + 4;
}
