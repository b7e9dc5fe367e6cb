#!/bin/sh
# Installs the Debian packages that the tests use, as root; otherwise says what is missing and goes on: the tests that need
# it are then skipped by name (docs/skips.md). Says nothing when all is there.
set -u

missing=
want() { # command package...
    command -v "$1" >/dev/null 2>&1 || { shift; missing="$missing $*"; }
}
want gcc gcc libc6-dev
want g++ g++
want go golang-go
want rustc rustc
want dwz dwz
want readelf binutils
want gdb gdb
want strace strace
want musl-gcc musl-tools
want redis-server redis-server redis-tools
want ip iproute2
command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing="$missing chromium"
for package in libc6-dbg python3-dbg; do
    [ -e "/usr/share/doc/$package" ] || missing="$missing $package"
done
ldconfig -p | grep -q 'libdw\.so\.1' || missing="$missing libdw1"
[ -e /usr/include/stdio.h ] || case "$missing" in *libc6-dev*) ;; *) missing="$missing libc6-dev" ;; esac
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "== missing:$missing. This is not Debian: install them your way. Tests that need them will be skipped, by name."
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "== missing:$missing. To run all tests: sudo apt-get install$missing. Those that need them will be skipped, by name."
    exit 0
fi

echo "== installing for the tests:$missing"
# Installing redis-server must not start a server on the developer's machine.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# shellcheck disable=SC2086 - the list is meant to be split
for step in "update" "install --yes --no-install-recommends $missing"; do
    echo "   apt-get $step"
    if ! apt-get -q $step </dev/null >"$log" 2>&1; then
        tail -n 15 "$log"
        echo "== apt-get $step failed; tests that need what is missing will say so"
        break
    fi
done
rm -f "$log"
exit 0
