"""Small programs whose code and symbols are known, built in the ways that matter to who reads them."""

from __future__ import annotations

from pathlib import Path

from tests.support.children import run

SOURCE = """
#include <stdio.h>
__attribute__((noinline)) int visible(int a) { return a * 7 + 1; }
__attribute__((noinline)) static int hidden(int a) { __asm__ volatile(""); return a + 3; }
static int chosen_one(void) { return 1; }
static int (*choose(void))(void) { return chosen_one; }
int chosen(void) __attribute__((ifunc("choose")));
int data_symbol = 5;
__asm__(".text\\n.globl asm_label\\nasm_label:\\n.byte 0x48,0xb8\\n.quad 0x1122334455667788\\nret\\n");
int main(void) {
    printf("ready\\n"); fflush(stdout);
    while (getchar() != EOF) visible(hidden(chosen()));
    return 0;
}
"""
"""``asm_label`` is untyped, without a size: a ten-byte ``movabs``, then ``ret``."""

VERSIONED = """
int old_f(void) { return 1; }
int new_f(void) { return 2; }
__asm__(".symver old_f,f@V1");
__asm__(".symver new_f,f@@V2");
"""

BUILDS = {
    "pie": (),
    "no-pie": ("-no-pie",),
    "one-segment": ("-Wl,-z,noseparate-code",),
    "one-segment-no-pie": ("-no-pie", "-Wl,-z,noseparate-code"),
    "static": ("-static",),
    "static-pie": ("-static-pie",),
    "O0": ("-O0",),
    "no-build-id": ("-Wl,--build-id=none",),
    "hash-sysv": ("-Wl,--hash-style=sysv",),
    "exported": ("-rdynamic",),
}


def build(directory: Path, *flags: str, name: str = "program", source: str = SOURCE) -> Path:
    """Compiles ``source``. Raises AssertionError with the compiler's words."""
    code = directory / f"{name}.c"
    code.write_text(source)
    output = directory / name
    result = run(["gcc", "-O1", *flags, code, "-o", output])
    assert result.returncode == 0, result.stderr
    return output


def strip(program: Path, *flags: str) -> Path:
    """Strips a copy of a program."""
    output = program.with_name(f"{program.name}-stripped")
    result = run(["strip", *flags, "-o", output, program])
    assert result.returncode == 0, result.stderr
    return output


def build_with(compiler: str, directory: Path, source: str, name: str, *flags: str) -> Path:
    """Compiles ``source``, kept as ``name``, by ``g++`` or ``rustc``. Raises AssertionError with the compiler's words."""
    code = directory / name
    code.write_text(source)
    output = code.with_suffix("")
    result = run([compiler, *flags, code, "-o", output])
    assert result.returncode == 0, result.stderr
    return output
