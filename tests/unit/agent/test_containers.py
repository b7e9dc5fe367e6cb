"""The container that control groups tell of: paths as the programs that run containers make them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline_agent.kernel.containers import container_of

ID = "4f9a1c" + "0123456789" * 5 + "abcdef01"
SHORT = ID[:12]


@pytest.mark.parametrize(
    ("path", "container"),
    [
        (f"/system.slice/docker-{ID}.scope", SHORT),
        (f"/docker/{ID}", SHORT),
        (f"/docker/{ID}/init.scope", SHORT),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container", SHORT),
        (f"/machine.slice/libpod-{ID}.scope", SHORT),
        (f"/machine.slice/libpod-conmon-{ID}.scope", ""),
        (f"/machine.slice/crio-conmon-{ID}.scope", ""),
        (
            f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-{ID}.scope",
            SHORT,
        ),
        (f"/kubepods/burstable/pod2b801b7a-5d3f-4d3c-8c40-35d5b6e1b6ee/{ID}", SHORT),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", SHORT),
        (f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{ID}", SHORT),
        (f"/docker/{'b' * 64}/docker/{ID}", SHORT),  # one inside of another
        (f"/../{ID}", SHORT),
        ("/machine.slice/machine-debian.scope/payload", "debian"),
        (r"/machine.slice/machine-my\x2dbox.scope", "my-box"),
        ("/machine.slice/systemd-nspawn@web.service/payload/system.slice/nginx.service", "web"),
        ("/lxc.payload.box/system.slice", "box"),
        ("/lxc/box", "box"),
        ("/lxc.monitor.box", ""),
        ("/", ""),
        ("/user.slice/user-0.slice/session-3.scope", ""),
        ("/system.slice/nginx.service", ""),
        (f"/system.slice/{'a' * 63}", ""),
        (f"/system.slice/{'a' * 65}", ""),
    ],
)
def test_the_id_or_name_in_a_path(path: str, container: str) -> None:
    assert container_of(f"0::{path}\n".encode()) == container
    assert container_of(f"5:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n".encode()) == container


@given(st.binary(max_size=4096))
def test_any_text_gives_a_name_or_none(data: bytes) -> None:
    assert isinstance(container_of(data), str)
