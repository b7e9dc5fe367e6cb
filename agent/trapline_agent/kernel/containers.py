"""The container that a process is in, by its control groups: what runs containers names a group after each."""

from __future__ import annotations

import re

_SHOWN = 12
"""Digits of an id: as many as `docker ps`, `podman ps` and `crictl ps` show."""
_ID = re.compile(rb"(?:^|[/:\-])([0-9a-f]{64})(?:\.scope)?(?=/|$)", re.MULTILINE)
"""/docker/ID, /kubepods/.../podUID/ID, docker-ID.scope, cri-containerd-ID.scope, crio-ID.scope, libpod-ID.scope; behind a
colon containerd's own driver for systemd (kubelet and containerd: cgroup drivers). A unit that only serves one, such as
libpod-conmon-ID.scope, is not in it."""
_NAMED = re.compile(
    rb"/(?:machine-|systemd-nspawn@|lxc/|lxc\.payload[./])([^/\n]+?)(?:\.scope|\.service)?(?=/|$)", re.MULTILINE
)
"""systemd-nspawn's (systemd-nspawn(1), --machine) and LXC's (lxc.container.conf(5), lxc.cgroup.dir) have names."""
_SERVES = re.compile(rb"[^\n]*(?:conmon-|/lxc\.monitor)[^\n]*")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def container_of(cgroups: bytes) -> str:
    """Returns a container's id (12 digits) or name; an empty text for a process outside of any.

    Args:
        cgroups: /proc/PID/cgroup.
    """
    text = _SERVES.sub(b"", cgroups)
    if ids := _ID.findall(text):
        return str(ids[-1][:_SHOWN].decode())  # the innermost one
    if names := _NAMED.findall(text):
        # systemd.unit(5), "String Escaping for Inclusion in Unit Names"
        return _ESCAPE.sub(lambda m: chr(int(m[1], 16)), names[-1].decode("utf-8", "replace"))
    return ""
