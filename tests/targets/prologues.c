/* Functions whose first instruction is one of the kinds an engine must displace, each checked against itself.
 *
 * At its start, before anything can be probed, the program runs every function with CASES sets of registers and flags and
 * keeps the whole register file, the flags, the change of rsp and the memory it touched. `run` does it again: whatever
 * differs is what a probe did. So no expected result is written down here, and a new function needs one line.
 *
 *   prologues
 *   list               names of the functions, the symbols to probe
 *   run NAME N | run all N     N rounds of CASES calls each; answers calls= wrong=
 *   why                what the last wrong call was
 *   count              calls= wrong=, then NAME=calls for each
 */
#include "target.h"

#define CASES 64

struct registers {
	uint64_t rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, flags, rsp_change, memory[4];
};
static const char *const names[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12",
				    "r13", "r14", "r15", "flags", "rsp", "memory0", "memory1", "memory2", "memory3"};

/* What the functions may read and write rip-relative; put back before each call. */
uint64_t memory[4];
static const uint64_t memory_start[4] = {5, 0x8000000000000001u, 0xffffffff, 0};

/* call_with(f, in, out): loads all registers and the arithmetic flags from *in, calls f, stores them to *out. */
void call_with(void (*f)(void), const struct registers *in, struct registers *out);
uint64_t harness_f, harness_out, harness_rsp;

__asm__(".text\n"
	".globl call_with\n.type call_with, @function\n"
	"call_with:\n"
	"  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
	"  sub $8, %rsp\n"
	"  mov %rdi, harness_f(%rip)\n"
	"  mov %rdx, harness_out(%rip)\n"
	"  mov %rsp, harness_rsp(%rip)\n"
	"  mov %rsi, %rax\n"
	"  pushq 120(%rax); popfq\n"
	"  mov 8(%rax), %rbx; mov 16(%rax), %rcx; mov 24(%rax), %rdx; mov 32(%rax), %rsi; mov 40(%rax), %rdi\n"
	"  mov 48(%rax), %rbp; mov 56(%rax), %r8; mov 64(%rax), %r9; mov 72(%rax), %r10; mov 80(%rax), %r11\n"
	"  mov 88(%rax), %r12; mov 96(%rax), %r13; mov 104(%rax), %r14; mov 112(%rax), %r15\n"
	"  mov 0(%rax), %rax\n"
	"  call *harness_f(%rip)\n"
	"  mov %rsp, harness_f(%rip)\n"
	"  mov harness_rsp(%rip), %rsp\n"
	"  pushfq\n"
	"  push %rax\n"
	"  mov harness_out(%rip), %rax\n"
	"  mov %rbx, 8(%rax); mov %rcx, 16(%rax); mov %rdx, 24(%rax); mov %rsi, 32(%rax); mov %rdi, 40(%rax)\n"
	"  mov %rbp, 48(%rax); mov %r8, 56(%rax); mov %r9, 64(%rax); mov %r10, 72(%rax); mov %r11, 80(%rax)\n"
	"  mov %r12, 88(%rax); mov %r13, 96(%rax); mov %r14, 104(%rax); mov %r15, 112(%rax)\n"
	"  mov %rax, %rcx; pop %rax; mov %rax, 0(%rcx)\n"
	"  popq 120(%rcx)\n"
	"  mov harness_f(%rip), %rax; sub harness_rsp(%rip), %rax; mov %rax, 128(%rcx)\n"
	"  mov memory(%rip), %rax; mov %rax, 136(%rcx)\n"
	"  mov memory+8(%rip), %rax; mov %rax, 144(%rcx)\n"
	"  mov memory+16(%rip), %rax; mov %rax, 152(%rcx)\n"
	"  mov memory+24(%rip), %rax; mov %rax, 160(%rcx)\n"
	"  cld\n"
	"  add $8, %rsp\n"
	"  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
	"  ret\n"
	".size call_with, .-call_with\n"
	/* Where calls and jumps of the functions lead. The callee shows the return address it was given. */
	"shown: mov (%rsp), %r11; lea 7(%rax), %rax; ret\n"
	"landed: lea 9(%rax), %rax; ret\n"
	".data\n.balign 8\n"
	"pointer_shown: .quad shown\n"
	"pointer_landed: .quad landed\n"
	".text\n");

/* F(name, body): the function p_NAME. Its first instruction is the body's first. */
#define F(name, body) \
	__asm__(".text\n.balign 16\n.globl p_" #name "\n.type p_" #name ", @function\np_" #name ":\n" body \
		"\n.size p_" #name ", .-p_" #name "\n.balign 16\n"); \
	extern void p_##name(void);

__asm__(".text\n.balign 16\n1: lea 3(%rax), %rax; ret\n" /* its target lies before it */
	".globl p_jmp_rel8_back\n.type p_jmp_rel8_back, @function\np_jmp_rel8_back: jmp 1b\n"
	".size p_jmp_rel8_back, .-p_jmp_rel8_back\n");
extern void p_jmp_rel8_back(void);

#define JCC(cc) \
	F(j##cc##_rel8, "j" #cc " 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret") \
	F(j##cc##_rel32, "{disp32} j" #cc " landed; lea 1(%rax), %rax; ret")

F(push_rbp, "push %rbp; mov %rsp, %rbp; mov (%rsp), %rax; pop %rbp; xor %ebp, %ebp; ret")
F(push_rbx, "push %rbx; mov (%rsp), %rax; pop %rbx; ret")
F(push_r12, "push %r12; mov (%rsp), %rax; pop %r12; ret")
F(push_r15, "push %r15; mov (%rsp), %rax; pop %r15; ret")
F(push_rsp, "push %rsp; pop %rax; sub %rsp, %rax; ret")
F(push_imm8, "push $-3; pop %rax; ret")
F(push_imm32, "push $0x12345678; pop %rax; ret")
F(push_rip, "pushq memory(%rip); pop %rax; ret")
F(pop_rdx, "pop %rdx; push %rdx; ret")
F(pushfq, "pushfq; pop %rax; ret")
F(sub_rsp_8, "sub $0x28, %rsp; lea 0x28(%rsp), %rsp; ret")
F(sub_rsp_32, "sub $0x1230, %rsp; lea 0x1230(%rsp), %rsp; ret")
F(add_rsp_neg, "add $-0x80, %rsp; lea 0x80(%rsp), %rsp; ret")
F(endbr64, "endbr64; mov %rdi, %rax; ret")
F(mov_reg_reg, "mov %rdi, %rax; ret")
F(mov_reg_reg32, "mov %edi, %eax; ret")
F(mov_r8_rsp, "mov %rsp, %r8; sub %rsp, %r8; mov %r8, %rax; ret")
F(mov_r10_rsp, "lea 8(%rsp), %r10; sub %rsp, %r10; ret")
F(mov_eax_imm, "mov $0x9abcdef0, %eax; ret")
F(mov_rax_imm, "mov $-2, %rax; ret")
F(movabs, "movabs $0x123456789abcdef0, %rax; ret")
F(mov_al_imm, "mov $7, %al; ret")
F(lea_rip, "lea memory(%rip), %rax; ret")
F(lea_sib, "lea 0x10(%rdi,%rsi,4), %rax; ret")
F(lea32_rip, "lea memory(%rip), %eax; ret")
F(cmp_rip_imm8, "cmpl $5, memory(%rip); ret")
F(cmp_rip_imm32, "cmpq $0x12345, memory+8(%rip); ret")
F(cmpb_rip_imm8, "cmpb $5, memory(%rip); ret")
F(test_rip_imm, "testb $4, memory(%rip); ret")
F(mov_load_rip, "mov memory+8(%rip), %rax; ret")
F(mov_store_rip, "mov %rdi, memory+16(%rip); ret")
F(mov_store_rip_imm, "movl $0x1234, memory+24(%rip); ret")
F(inc_rip, "incq memory(%rip); ret")
F(lock_xadd_rip, "lock xadd %rdi, memory+8(%rip); ret")
F(red_zone, "mov %rdi, -8(%rsp); mov -8(%rsp), %rax; ret")
F(movzx_rip, "movzbl memory+9(%rip), %eax; ret")
F(xor_eax_eax, "xor %eax, %eax; ret")
F(xor_r8d_r8d, "xor %r8d, %r8d; ret")
F(test_edi_edi, "test %edi, %edi; ret")
F(test_rdi_rsi, "test %rdi, %rsi; ret")
F(cmp_rdi_imm, "cmp $100, %rdi; ret")
F(add_rdi_rsi, "add %rsi, %rdi; ret")
F(adc_rdi_rsi, "adc %rsi, %rdi; ret")
F(imul, "imul $3, %rdi, %rax; ret")
F(shl, "shl $3, %rdi; ret")
F(mul, "mul %rsi; ret")
F(bswap, "bswap %rdi; ret")
F(cqo, "cqo; ret")
F(cdqe, "cdqe; ret")
F(xchg, "xchg %rdi, %rsi; ret")
F(stc, "stc; ret")
F(cmc, "cmc; ret")
F(lahf, "lahf; ret")
F(jmp_rel8, "jmp 1f; ud2; 1: lea 2(%rax), %rax; ret")
F(jmp_rel32, "{disp32} jmp landed")
F(jmp_rip, "jmp *pointer_landed(%rip)")
F(jmp_reg, "jmp *%r14")
F(notrack_jmp_reg, "notrack jmp *%r14")
F(call_rel32, "call shown; ret")
F(call_next, "call 1f; 1: pop %rax; ret")
F(call_rip, "call *pointer_shown(%rip); ret")
F(call_reg, "call *%r15; ret")
F(ret, "ret")
F(rep_ret, "rep ret")
F(ret_imm, "ret $16")
F(nop, "nop; mov %rsi, %rax; ret")
F(nop2, ".byte 0x66,0x90; mov %rsi, %rax; ret")
F(nop3, "nopl (%rax); mov %rsi, %rax; ret")
F(nop4, ".byte 0x0f,0x1f,0x40,0x00; mov %rsi, %rax; ret")
F(nop5, ".byte 0x0f,0x1f,0x44,0x00,0x00; mov %rsi, %rax; ret")
F(nop7, ".byte 0x0f,0x1f,0x80,0,0,0,0; mov %rsi, %rax; ret")
F(nop9, ".byte 0x66,0x0f,0x1f,0x84,0,0,0,0,0; mov %rsi, %rax; ret")
F(loop, "loop 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret")
F(loope, "loope 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret")
F(loopne, "loopne 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret")
F(jrcxz, "jrcxz 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret")
F(jecxz, "jecxz 1f; lea 1(%rax), %rax; ret; 1: lea 2(%rax), %rax; ret")
F(loop_self, "loop p_loop_self; ret")
F(cmovz, "cmovz %rdi, %rax; ret")
F(cmovb_32, "cmovb %edi, %eax; ret")
F(setl, "setl %al; ret")
F(mov_fs, "mov %fs:0, %rax; ret")
F(mov_fs_28, "mov %fs:0x28, %rax; ret")
F(cpuid, "cpuid; xor %ebx, %ebx; ret") /* ebx of leaf 1 holds the CPU's number */
F(syscall_getpid, "syscall; ret")      /* leaves its return address in rcx, the flags in r11 */
F(rep_stosb, "rep stosb; ret")
F(pxor, "pxor %xmm0, %xmm0; movq %xmm0, %rax; ret")
F(movq_xmm, "movq %rdi, %xmm1; movq %xmm1, %rax; ret")
F(movss_rip, "movss memory(%rip), %xmm0; movq %xmm0, %rax; ret")
F(unaligned_prefixes, ".byte 0x66,0x66,0x66,0x66,0x66; mov %rdi, %rax; ret")
JCC(o) JCC(no) JCC(b) JCC(ae) JCC(e) JCC(ne) JCC(be) JCC(a) JCC(s) JCC(ns) JCC(p) JCC(np) JCC(l) JCC(ge) JCC(le) JCC(g)

#define J(cc) E(j##cc##_rel8) E(j##cc##_rel32)
#define ALL \
	E(push_rbp) E(push_rbx) E(push_r12) E(push_r15) E(push_rsp) E(push_imm8) E(push_imm32) E(push_rip) E(pop_rdx) \
	E(pushfq) E(sub_rsp_8) E(sub_rsp_32) E(add_rsp_neg) E(endbr64) E(mov_reg_reg) E(mov_reg_reg32) E(mov_r8_rsp) \
	E(mov_r10_rsp) E(mov_eax_imm) E(mov_rax_imm) E(movabs) E(mov_al_imm) E(lea_rip) E(lea_sib) E(lea32_rip) \
	E(cmp_rip_imm8) E(cmp_rip_imm32) E(cmpb_rip_imm8) E(test_rip_imm) E(mov_load_rip) E(mov_store_rip) \
	E(mov_store_rip_imm) E(inc_rip) E(lock_xadd_rip) E(red_zone) E(movzx_rip) E(xor_eax_eax) \
	E(xor_r8d_r8d) E(test_edi_edi) E(test_rdi_rsi) E(cmp_rdi_imm) E(add_rdi_rsi) E(adc_rdi_rsi) E(imul) E(shl) \
	E(mul) E(bswap) E(cqo) E(cdqe) E(xchg) E(stc) E(cmc) E(lahf) E(jmp_rel8) E(jmp_rel8_back) E(jmp_rel32) \
	E(jmp_rip) E(jmp_reg) E(notrack_jmp_reg) E(call_rel32) E(call_next) E(call_rip) E(call_reg) E(ret) E(rep_ret) \
	E(ret_imm) E(nop) E(nop2) E(nop3) E(nop4) E(nop5) E(nop7) E(nop9) E(loop) E(loope) E(loopne) E(jrcxz) \
	E(jecxz) E(loop_self) E(cmovz) E(cmovb_32) E(setl) E(mov_fs) E(mov_fs_28) E(cpuid) E(syscall_getpid) \
	E(rep_stosb) E(pxor) E(movq_xmm) E(movss_rip) E(unaligned_prefixes) \
	J(o) J(no) J(b) J(ae) J(e) J(ne) J(be) J(a) J(s) J(ns) J(p) J(np) J(l) J(ge) J(le) J(g)

static const struct { const char *name; void (*f)(void); } functions[] = {
#define E(name) {#name, p_##name},
	ALL
};
#define FUNCTIONS (sizeof functions / sizeof *functions)
static struct registers expected[FUNCTIONS][CASES];
static counter calls[FUNCTIONS];
static uint64_t all_calls, wrong;
static char why[256] = "nothing";
static char buffer[64];

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* Registers of one case: random words; rcx small for the loops; all arithmetic flags in all their combinations. */
static void call_case(size_t k, uint64_t i, struct registers *out)
{
	struct registers in;
	for (size_t r = 0; r < 15; r++)
		((uint64_t *)&in)[r] = mix(i * 64 + r + 1);
	in.rcx = i % 4 ? mix(i) % 3 : mix(i) & 0xff;
	if (i % 8 == 7)
		in.rcx |= 0x100000000u; /* jecxz looks at half of it */
	in.flags = 0x202 | (i & 1) | (i & 2) << 1 | (i & 4) << 2 | (i & 8) << 3 | (i & 16) << 3 | (i & 32) << 6;
	if (functions[k].f == p_jmp_reg || functions[k].f == p_notrack_jmp_reg)
		in.r14 = *(uint64_t *)({ void *p; __asm__("lea pointer_landed(%%rip), %0" : "=r"(p)); p; });
	if (functions[k].f == p_call_reg)
		in.r15 = *(uint64_t *)({ void *p; __asm__("lea pointer_shown(%%rip), %0" : "=r"(p)); p; });
	if (functions[k].f == p_syscall_getpid)
		in.rax = 39;
	if (functions[k].f == p_cpuid)
		in.rax = 0, in.rcx = 0;
	if (functions[k].f == p_rep_stosb)
		in.rdi = (uint64_t)buffer, in.rcx = i % 33;
	if (functions[k].f == p_loop_self)
		in.rcx = 1 + i % 5;
	memcpy(memory, memory_start, sizeof memory);
	memset(buffer, 0, sizeof buffer);
	memset(out, 0, sizeof *out);
	call_with(functions[k].f, &in, out);
	if (functions[k].f == p_rep_stosb)
		for (size_t b = 0; b < sizeof buffer; b++)
			out->memory[3] = out->memory[3] * 31 + (unsigned char)buffer[b];
	out->flags &= ~0x10000u; /* RF */
}

static uint64_t passes(size_t k, uint64_t i) /* how often the entry is executed: loop_self jumps to itself */
{
	return functions[k].f == p_loop_self ? 1 + i % 5 : 1;
}

static void run(size_t k, unsigned long rounds)
{
	struct registers out;
	while (rounds--)
		for (uint64_t i = 0; i < CASES; i++) {
			call_case(k, i, &out);
			calls[k] += passes(k, i);
			all_calls += passes(k, i);
			if (!memcmp(&out, &expected[k][i], sizeof out))
				continue;
			wrong++;
			for (size_t r = 0; r < sizeof names / sizeof *names; r++) {
				uint64_t got = ((uint64_t *)&out)[r], want = ((uint64_t *)&expected[k][i])[r];
				if (got != want)
					snprintf(why, sizeof why, "%s case %lu: %s is %#lx, not %#lx", functions[k].name, i,
						 names[r], got, want);
			}
		}
}

int main(void)
{
	char line[256], name[64];
	unsigned long n;
	for (size_t k = 0; k < FUNCTIONS; k++)
		for (uint64_t i = 0; i < CASES; i++)
			call_case(k, i, &expected[k][i]);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (!strcmp(line, "list")) {
			char all[4000] = "list";
			for (size_t k = 0; k < FUNCTIONS; k++)
				strcat(strcat(all, " p_"), functions[k].name);
			say("%s", all);
		} else if (sscanf(line, "run %63s %lu", name, &n) == 2) {
			const char *bare = strncmp(name, "p_", 2) ? name : name + 2;
			uint64_t calls0 = all_calls, wrong0 = wrong;
			for (size_t k = 0; k < FUNCTIONS; k++)
				if (!strcmp(bare, "all") || !strcmp(bare, functions[k].name))
					run(k, n);
			say("ran calls=%lu wrong=%lu", all_calls - calls0, wrong - wrong0);
		} else if (!strcmp(line, "why")) {
			say("why %s", why);
		} else if (!strcmp(line, "count")) {
			char all[4000];
			int at = snprintf(all, sizeof all, "count calls=%lu wrong=%lu", all_calls, wrong);
			for (size_t k = 0; k < FUNCTIONS; k++)
				at += snprintf(all + at, sizeof all - (size_t)at, " %s=%lu", functions[k].name,
					       (uint64_t)calls[k]);
			say("%s", all);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
