"""What gdb says of a program's debug information. gdb itself runs this file (``gdb --batch -x``), without anything of ours.

The job is JSON in the file that $TRAPLINE_JOB names; the answers are written to $TRAPLINE_JOB.out.
"""

import json
import os
import struct

import gdb

REGISTERS = ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip")
"""By their DWARF numbers: System V ABI, figure 3.36."""
MASK = (1 << 64) - 1
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << min(b, 64),
    "shr": lambda a, b: a >> min(b, 64),
    "shra": lambda a, b: (a - (1 << 64) if a >> 63 else a) >> min(b, 64),
}


def main():
    with open(os.environ["TRAPLINE_JOB"]) as file:
        job = json.load(file)
    for setting in ("pagination off", "confirm off", "breakpoint pending off", "disable-randomization on"):
        gdb.execute("set " + setting)
    result = {
        "lines": {text: locations(text) for text in job.get("lines", ())},
        "globals": {name: int(gdb.parse_and_eval("&" + name)) for name in job.get("globals", ())},
        "sources": {str(pc): source(pc) for pc in job.get("sources", ())},
        "types": {name: described(gdb.lookup_type(name), 0) for name in job.get("types", ())},
    }
    if job.get("places"):
        result["values"] = values(job["places"])
    with open(os.environ["TRAPLINE_JOB"] + ".out", "w") as file:
        json.dump(result, file)


# --- without running it


def locations(text):
    """The addresses of a line, or of the next that has code; what gdb says where there is none."""
    try:
        return sorted({sal.pc for sal in gdb.decode_line(text)[1] or ()})
    except gdb.error as e:
        return str(e)


def source(pc):
    found = gdb.find_pc_line(pc)
    return [found.symtab.filename, found.line] if found.symtab is not None else None


def described(t, depth):
    """A type as nested lists: [kind, name, size, ...]."""
    t = t.strip_typedefs().unqualified()
    name = t.name or t.tag or ""
    if depth > 4:
        return ["deep"]
    if t.code in (gdb.TYPE_CODE_STRUCT, gdb.TYPE_CODE_UNION):
        kind = "union" if t.code == gdb.TYPE_CODE_UNION else "struct"
        fields = [
            f
            for f in t.fields()
            if hasattr(f, "bitpos") and not f.artificial and not (f.name or "").startswith("_vptr")
        ]
        members = [
            [f.name or "", f.bitpos, f.bitsize, bool(f.is_base_class), described(f.type, depth + 1)] for f in fields
        ]
        return [kind, name, t.sizeof, members]
    if t.code == gdb.TYPE_CODE_ENUM:
        return ["enum", name, t.sizeof, [[f.name.rpartition("::")[2], f.enumval] for f in t.fields()]]
    if t.code == gdb.TYPE_CODE_ARRAY:
        counts = []
        while t.code == gdb.TYPE_CODE_ARRAY:
            low, high = t.range()
            counts.append(max(high - low + 1, 0))
            t = t.target().strip_typedefs()
        return ["array", counts, described(t, depth + 1)]
    if t.code == gdb.TYPE_CODE_PTR or t.code in (gdb.TYPE_CODE_REF, gdb.TYPE_CODE_RVALUE_REF):
        kind = "pointer" if t.code == gdb.TYPE_CODE_PTR else "reference"
        target = t.target().strip_typedefs().unqualified()
        inner = "function" if target.code == gdb.TYPE_CODE_FUNC else target.name or target.tag or ""
        return [kind, t.sizeof, inner]
    return ["base", name, t.sizeof]


# --- while it runs


def values(places):
    """At each place: the function, and for each variable what gdb has and what our operations come to."""
    gdb.execute("set language c")
    static = main_address()
    gdb.execute("starti", to_string=True)
    base = main_address() - static
    gdb.execute("delete")
    wanted = {}
    for place in places:
        address = place["vaddr"] + base
        gdb.Breakpoint(f"*{address:#x}", temporary=True)
        wanted[address] = place
    found = []
    for _ in range(len(places)):
        gdb.execute("continue", to_string=True)
        if not gdb.selected_inferior().pid or gdb.selected_thread() is None:
            break
        frame = gdb.newest_frame()
        place = wanted.get(frame.pc())
        if place is None:
            break
        found.append(at(frame, place, base))
    if gdb.selected_inferior().pid:  # else it has ended: not all places are come by
        gdb.execute("kill", to_string=True)
    return found


def main_address():
    try:
        return int(gdb.parse_and_eval("(long)&main"))
    except gdb.error:
        return 0  # Go has none of this name, and is not moved


def at(frame, place, base):
    block = frame.block()
    names = {}
    while block is not None and not block.is_global and not block.is_static:
        for symbol in block:
            if (symbol.is_variable or symbol.is_argument) and symbol.name not in names:
                names[symbol.name] = value_of(symbol, frame)
        if block.function is not None:
            break
        block = block.superblock
    sal = frame.find_sal()
    ours = {v["name"]: ours_of(v, base) for v in reversed(place["variables"])}
    return {
        "vaddr": place["vaddr"],
        "function": frame.name(),
        "line": sal.line,
        "gdb": names,
        "ours": ours,
        "frames": frames(frame),
    }


def frames(frame):
    """The functions that the innermost one is inlined into."""
    found = []
    while frame is not None and frame.type() == gdb.INLINE_FRAME:
        frame = frame.older()
        found.append(frame.name())
    return found


def value_of(symbol, frame):
    """[kind, value]: an integer, the bits of a float, or a struct's bytes."""
    try:
        value = symbol.value(frame)
        if value.is_optimized_out:
            return ["optimised-out", None]
        t = value.type.strip_typedefs()
        if t.code in (gdb.TYPE_CODE_REF, gdb.TYPE_CODE_RVALUE_REF):
            return ["bytes", int(value.referenced_value().address).to_bytes(8, "little").hex()]
        if value.address is not None:
            data = gdb.selected_inferior().read_memory(value.address, t.sizeof)
            return ["bytes", bytes(data).hex()]
        if t.code == gdb.TYPE_CODE_FLT:
            return ["bytes", struct.pack("<d" if t.sizeof == 8 else "<f", float(value)).hex()]
        if t.code in (gdb.TYPE_CODE_STRUCT, gdb.TYPE_CODE_UNION, gdb.TYPE_CODE_ARRAY):
            return ["bytes", flat(value).hex()]
        return ["bytes", (int(value) & ((1 << 8 * t.sizeof) - 1)).to_bytes(t.sizeof, "little").hex()]
    except (gdb.error, ValueError) as e:
        return ["error", str(e)]


def flat(value):
    """A struct's bytes, from its fields: it is in registers."""
    t = value.type.strip_typedefs()
    if t.code == gdb.TYPE_CODE_STRUCT:
        data = bytearray(t.sizeof)
        for field in t.fields():
            part = flat(value[field])
            data[field.bitpos // 8 : field.bitpos // 8 + len(part)] = part
        return bytes(data)
    if t.code == gdb.TYPE_CODE_FLT:
        return struct.pack("<d" if t.sizeof == 8 else "<f", float(value))
    return (int(value) & ((1 << 8 * t.sizeof) - 1)).to_bytes(t.sizeof, "little")


def ours_of(variable, base):
    location, size = variable["location"], variable["size"]
    kinds = {location["kind"], *(inner["kind"] for inner, _ in location["pieces"])}
    for kind in ("optimised-out", "unsupported"):
        if kind in kinds:
            return [kind, location["reason"]]
    try:
        return ["bytes", data_at(location, size, base).hex()]
    except gdb.error as e:
        return ["error", str(e)]


def data_at(location, size, base):
    """The bytes of a variable: what whoever consumes a Location does."""
    kind = location["kind"]
    if kind == "pieces":
        data = b""
        for inner, length in location["pieces"]:
            data += data_at(inner, length, base)
        return data
    if kind == "register":
        number = location["ops"][0][1]
        if number >= 17:
            halves = (gdb.parse_and_eval(f"$xmm{number - 17}.v2_int64[{i}]") for i in (0, 1))
            return b"".join((int(half) & MASK).to_bytes(8, "little") for half in halves)[:size]
        return register(number).to_bytes(8, "little")[:size]
    result = compute(location["ops"], base)
    if kind == "value":
        return result.to_bytes(8, "little")[:size]
    return bytes(gdb.selected_inferior().read_memory(result, size)) if size else b""


def register(number):
    return int(gdb.parse_and_eval(f"(unsigned long)${REGISTERS[number]}")) & MASK


def compute(ops, base):
    stack = []
    for op, n in ops:
        if op == "reg":
            stack.append(register(n))
        elif op == "const":
            stack.append(n & MASK)
        elif op == "load":
            stack.append(n + base)
        elif op == "plus":
            stack.append((stack.pop() + n) & MASK)
        elif op == "deref":
            stack.append(int.from_bytes(bytes(gdb.selected_inferior().read_memory(stack.pop(), n)), "little"))
        elif op in ("neg", "not"):
            stack.append((-stack.pop() if op == "neg" else ~stack.pop()) & MASK)
        elif op == "dup":
            stack.append(stack[-1])
        elif op == "drop":
            stack.pop()
        else:
            b, a = stack.pop(), stack.pop()
            if op == "swap":
                stack += [b, a]
                continue
            stack.append(BINARY[op](a, b) & MASK)
    return stack[-1]


main()
