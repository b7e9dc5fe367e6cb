"""The compose file, the images and the units: what they must grant, and what they must not.

There need be no container engine where tests run: the file is read as YAML and held against what the code asks of it,
and by Compose itself where that is installed.
"""

from __future__ import annotations

import configparser
import fnmatch
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import needs
from tests.support.children import Child, run
from trapline.state import DEFAULT_PORT

ROOT = Path(__file__).resolve().parents[2]
AGENT_CAPABILITIES = {"SYS_PTRACE", "DAC_OVERRIDE", "CHECKPOINT_RESTORE", "PERFMON", "SYS_NICE"}
UNITS = sorted([*ROOT.glob("agent/*.service"), *ROOT.glob("service/*.service")])


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = compose["services"]
    assert isinstance(found, dict)
    return found


def test_the_parts_are_there(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"token", "service", "agent", "demo"}


def test_the_first_probe_it_proposes_means_the_demo(services: dict[str, dict[str, Any]]) -> None:
    from trapline.spec import parse_probe

    proposed = re.search(r"^#   a first probe:  (.+)$", (ROOT / "docker-compose.yml").read_text(), re.M)
    assert proposed
    spec = parse_probe(proposed[1])
    assert (spec.object, spec.point.value) == ("libsqlite3.so.0", "sqlite3_step")
    program, option, code = services["demo"]["command"]
    assert option == "-c"
    assert fnmatch.fnmatch(program, spec.where["comm"])
    assert "sqlite3" in code
    compile(code, "demo", "exec")


def test_nothing_is_privileged_and_all_start_from_no_capability(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert not service.get("privileged"), name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["read_only"] is True, name


def test_only_the_agent_gets_capabilities(services: dict[str, dict[str, Any]]) -> None:
    assert set(services["agent"]["cap_add"]) == AGENT_CAPABILITIES
    assert "apparmor=unconfined" in services["agent"]["security_opt"]
    assert [n for n, s in services.items() if "cap_add" in s] == ["agent"]
    assert not any("seccomp=unconfined" in s["security_opt"] for s in services.values())


def test_the_agent_and_the_service_see_the_same_pids(services: dict[str, dict[str, Any]]) -> None:
    """Semantics P11: the service names itself to the agent by its pid, which means nothing in another pid namespace."""
    assert services["agent"]["pid"] == services["service"]["pid"] == "host"


def test_the_port_is_open_on_loopback_only(services: dict[str, dict[str, Any]]) -> None:
    published = {n: s["ports"] for n, s in services.items() if "ports" in s}
    assert set(published) == {"service"}
    (port,) = published["service"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(f":{DEFAULT_PORT}")


def test_the_token_is_in_a_volume_and_in_no_environment(services: dict[str, dict[str, Any]]) -> None:
    where = "/run/trapline-token"
    assert f"token:{where}" in services["token"]["volumes"]
    for name in ("service", "agent"):
        assert f"token:{where}:ro" in services[name]["volumes"]
        assert not [k for k in services[name].get("environment", {}) if "TOKEN" in k], name
        assert f"$$(cat {where}/token)" in " ".join(services[name]["command"]), name
    assert "demo" not in [n for n, s in services.items() if any("token" in v for v in s.get("volumes", []))]


def test_the_token_script_makes_one_once(services: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    from trapline_service.config import TOKEN_PATTERN

    program, option, script = services["token"]["command"]
    assert (program, option) == ("python", "-c")
    code = script.replace("/run/trapline-token", str(tmp_path))
    result = run([sys.executable, "-c", code], env={"TRAPLINE_ADMIN_TOKEN": ""})
    assert result.returncode == 0, result.stderr
    token = (tmp_path / "token").read_text()
    assert TOKEN_PATTERN.match(token)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o400
    run([sys.executable, "-c", code])
    assert (tmp_path / "token").read_text() == token
    (tmp_path / "token").unlink()
    run([sys.executable, "-c", code], env={"TRAPLINE_ADMIN_TOKEN": "tlp_" + "x" * 40})
    assert (tmp_path / "token").read_text() == "tlp_" + "x" * 40


def test_the_tracer_is_the_main_process_and_has_time_to_clean_up(services: dict[str, dict[str, Any]]) -> None:
    """What Docker signals must be the process that holds the breakpoints."""
    dockerfile = (ROOT / "agent/Dockerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", dockerfile, re.M)
    assert entry
    words = yaml.safe_load(entry[1])
    assert words[0] == "trapline-tracer"
    assert words[-1] == "--supervise", "what follows is the agent"
    socket = re.search(r"TRAPLINE_AGENT_TRACER_SOCKET=(\S+)", dockerfile)
    assert socket
    assert words[words.index("--socket") + 1] == socket[1]
    assert "entrypoint" not in services["agent"]
    assert not services["agent"].get("init"), "an init would be the main process"
    assert int(services["agent"]["stop_grace_period"].removesuffix("s")) > 30, "longer than the lease"


@needs.ptrace
def test_the_entry_point_supervises_what_follows(tmp_path: Path) -> None:
    """The image's own words, with another socket: the command runs, runs again when it ends, and goes with the tracer."""
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "agent/Dockerfile").read_text(), re.M)
    assert entry
    words = yaml.safe_load(entry[1])
    words[words.index("--socket") + 1] = str(tmp_path / "tracer.sock")
    command = ["sh", "-c", "echo agent $$; read line < /dev/null"]
    paths = f"{ROOT}:{ROOT / 'agent'}"
    tracer = [sys.executable, "-m", "trapline_agent.tracer", *words[1:], *command]
    with Child(tracer, ready="agent ", env={"PYTHONPATH": paths}) as child:
        first = child.ready_line
        assert child.wait_for("agent ") != first, "an agent that ended is started again"
        child.signal(signal.SIGTERM)
        assert child.wait() == 0


def test_what_is_written_to_is_a_volume(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    for name, state in (("service", "state"), ("agent", "agent-state")):
        assert f"{state}:/var/lib/trapline" in services[name]["volumes"]
        assert "TRAPLINE_STATE_DIR=/var/lib/trapline" in (ROOT / name / "Dockerfile").read_text()
    assert set(compose["volumes"]) == {"state", "agent-state", "token"}


def test_the_service_image_is_not_root() -> None:
    lines = (ROOT / "service/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["trapline"]
    assert lines.index("USER trapline") < lines.index('CMD ["trapline", "serve"]')


def test_every_environment_variable_is_a_setting(services: dict[str, dict[str, Any]]) -> None:
    from trapline_agent.config import AgentSettings
    from trapline_service.config import Settings

    known = {f"TRAPLINE_{f.upper()}" for f in Settings.model_fields}
    known |= {f"TRAPLINE_AGENT_{f.upper()}" for f in AgentSettings.model_fields}
    given = {k for s in services.values() for k in s.get("environment", {})}
    for text in [ROOT / "agent/Dockerfile", ROOT / "service/Dockerfile", *UNITS]:
        given |= set(re.findall(r"\b(TRAPLINE_[A-Z_]+)=", text.read_text()))
    given -= {"TRAPLINE_WEB"}  # the build's, not the program's
    assert given <= known


@needs.docker_compose
def test_compose_itself_accepts_it() -> None:
    result = run(["docker", "compose", "-f", ROOT / "docker-compose.yml", "config", "--quiet"])
    assert result.returncode == 0, result.stderr


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_the_tracer_unit_outlives_the_agent_unit() -> None:
    tracer, agent = unit(ROOT / "agent/trapline-tracer.service"), unit(ROOT / "agent/trapline-agent.service")
    assert "trapline-tracer.service" in agent["Unit"]["Wants"]
    for tie in ("BindsTo", "Requires", "PartOf"):
        assert tie not in agent["Unit"]
        assert tie not in tracer["Unit"], "the tracer must not go when the agent does"
    assert int(tracer["Service"]["TimeoutStopSec"]) > 30, "longer than the lease"
    assert "--stay" in tracer["Service"]["ExecStart"].split()
    assert tracer["Service"]["ExecStart"].split()[-1] in (ROOT / "agent/trapline-agent.service").read_text()


def test_the_units_grant_what_the_container_grants() -> None:
    tracer = unit(ROOT / "agent/trapline-tracer.service")["Service"]["CapabilityBoundingSet"].split()
    agent = unit(ROOT / "agent/trapline-agent.service")["Service"]["CapabilityBoundingSet"].split()
    assert {c.removeprefix("CAP_") for c in tracer} == AGENT_CAPABILITIES
    assert "CAP_DAC_OVERRIDE" not in agent, "the agent writes into nobody"


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_units_drop_privileges(path: Path) -> None:
    service = unit(path)["Service"]
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert "CapabilityBoundingSet" in service
