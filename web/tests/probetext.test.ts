import { describe, expect, test } from "vitest";
import { expressionOf, isReturn, joinProbe, searchOf, splitProbe, toggleCapture, withLocation, withSelector, withSuggestion } from "../src/ui/probetext";

describe("taking a probe text apart", () => {
  test.each([
    "redis-server:processCommand",
    "q=redis-server:processCommand {arg0, cmd=str(arg1, 64)}",
    "ur:libc.so.6:malloc @ comm=nginx, host=web-* if arg0 > 4096 {size=arg0} -> count()",
    'app:"ns::Cls::operator->" {arg0}',
    "app:/^do_{2}/ {arg0}",
    "libc.so.6:malloc@@GLIBC_2.2.5 @ pid=7",
    "app:server.c:120 {str(arg0)}",
    "*:malloc",
    "/usr/bin/app:0x1234",
    'app:f @ comm="a, b" {x=arg0}',
  ])("%s reads back", (text) => {
    expect(joinProbe(splitProbe(text))).toBe(text);
  });

  test("clauses come in any order, and words with if in them are no clause", () => {
    expect(splitProbe("app:notify {arg0} if pid == 3 @ uid=0")).toEqual({
      head: "app:notify",
      where: [{ key: "uid", value: "0" }],
      condition: "pid == 3",
      captures: ["arg0"],
      aggregate: "",
      rest: "",
    });
  });

  test("what belongs to no clause is kept", () => {
    expect(joinProbe(splitProbe("app:f {arg0} what @ pid=3"))).toBe("app:f @ pid=3 {arg0} what");
  });

  test.each(["", "{", "}", "@", "a:{", '"', "a:b @ =", "a:b {x,,y", "->", "a:/x", "a:b if", "{{{}}", "@a=@b="])("%s does not throw, and settles", (text) => {
    const once = joinProbe(splitProbe(text));
    expect(joinProbe(splitProbe(once))).toBe(once);
  });
});

describe("editing it with clicks", () => {
  test("a capture is added, and taken out under whatever name", () => {
    const with2 = toggleCapture("a:f {size=arg0}", "str(arg1)");
    expect(with2).toBe("a:f {size=arg0, str(arg1)}");
    expect(toggleCapture(with2, "arg0")).toBe("a:f {str(arg1)}");
    expect(toggleCapture("a:f {arg0}", "arg0")).toBe("a:f");
    expect(expressionOf("cmd = str( arg1 )")).toBe("str(arg1)");
    expect(expressionOf("arg0 == 3")).toBe("arg0==3");
  });

  test("selectors replace one another, and odd values are quoted", () => {
    expect(withSelector("a:f @ comm=x, uid=0 {arg0}", { comm: "", pid: "12" })).toBe("a:f @ uid=0, pid=12 {arg0}");
    expect(withSelector("a:f", { comm: "Web Content" })).toBe('a:f @ comm="Web Content"');
    expect(withSelector("a:f @ pid=1", { pid: "" })).toBe("a:f");
  });

  test("a symbol goes to its place", () => {
    expect(withLocation("mal", "libc.so.6", "malloc")).toBe("libc.so.6:malloc");
    expect(withLocation("n=u:mal @ pid=3 {arg0}", "libc.so.6", "malloc")).toBe("n=u:libc.so.6:malloc @ pid=3 {arg0}");
    expect(withLocation("x", "app", "ns::f(int)")).toBe('app:"ns::f(int)"');
  });

  test("a suggestion takes the place of what was not found", () => {
    expect(withSuggestion("libc.so.6:maloc {arg0}", "malloc")).toBe("libc.so.6:malloc {arg0}");
    expect(withSuggestion("lib:maloc {arg0}", "libc.so.6:malloc")).toBe("libc.so.6:malloc {arg0}");
  });

  test.each([
    ["mal", { module: "", q: "mal" }],
    ["libc.so.6:mal", { module: "libc.so.6", q: "mal" }],
    ["ur:libc.so.6:mal @ pid=3", { module: "libc.so.6", q: "mal" }],
    ["n=u:/usr/bin/app:do {arg0}", { module: "/usr/bin/app", q: "do" }],
    ['app:"ns::Cl', { module: "app", q: "ns::Cl" }],
    ["ns::Cls", { module: "", q: "ns::Cls" }],
    ["", { module: "", q: "" }],
  ])("%s is searched for as %o", (text, want) => {
    expect(searchOf(text)).toEqual(want);
  });
});

test("return probes are known by their kind", () => {
  expect(["ur:libc.so.6:malloc", " slow = ur:a:b {retval}", "uretprobe:/bin/a:b"].map(isReturn)).toEqual([true, true, true]);
  expect(["libc.so.6:malloc", "u:a:b", "ur", "a:ur:b", "x=u:ur:b", ""].map(isReturn)).toEqual([false, false, false, false, false, false]);
});
