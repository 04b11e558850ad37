"""examples/deploy: what can be checked where neither Docker nor Kubernetes nor systemd runs."""

from __future__ import annotations

import collections
import configparser
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.children import PATIENCE
from support.waiting import wait_until

ROOT = pathlib.Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
UNIT = DEPLOY / "systemd" / "shop.service"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "docker" / "compose.yaml"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT
    )


def test_the_unit(tmp_path: pathlib.Path) -> None:
    """systemd has nothing to say of it. Its program is not on this machine: another takes its
    place."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("not installed: systemd-analyze (Debian: systemd)")
    text = UNIT.read_text(encoding="utf-8")
    there, count = re.subn(r"^(ExecStart=)\S+/gunicorn", r"\1/bin/true", text, flags=re.M)
    assert count == 1
    (tmp_path / UNIT.name).write_text(there, encoding="utf-8")
    done = _run(verify, "verify", str(tmp_path / UNIT.name))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / UNIT.name).write_text(there + "\n[Service]\nRemoveIpc=no\n", encoding="utf-8")
    assert "RemoveIpc" in _run(verify, "verify", str(tmp_path / UNIT.name)).stderr  # it can fail


def test_what_the_unit_must_not_say() -> None:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(UNIT)
    service = read["Service"]
    assert service["RemoveIPC"] == "no"
    assert {"DynamicUser", "ProcSubset", "TemporaryFileSystem", "RootDirectory"}.isdisjoint(service)


def _compose() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not _run(*command, "version").returncode:
            return command
    pytest.skip("not installed: docker compose (Debian: docker-compose)")


def test_compose(tmp_path: pathlib.Path) -> None:
    """As Compose reads it: needs no daemon."""
    command = _compose()
    done = _run(*command, "--file", str(COMPOSE), "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert (services["web"]["ipc"], services["jobs"]["ipc"]) == ("shareable", "service:web")
    assert services["web"]["user"] == services["jobs"]["user"]
    assert pathlib.Path(services["web"]["build"]["context"]) == ROOT
    assert (ROOT / services["web"]["build"]["dockerfile"]).samefile(DOCKERFILE)
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text(encoding="utf-8").replace("shm_size:", "shmsize:"))
    assert _run(*command, "--file", str(wrong), "config", "--quiet").returncode != 0


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path: pathlib.Path) -> None:
    """By the schemas of Kubernetes, without unknown fields."""
    validate = pytest.importorskip("kubernetes_validate", reason="not installed")
    yaml = pytest.importorskip("yaml", reason="not installed")
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert documents
    for document in documents:
        validate.validate(document, validate.latest_version(), strict=True)
        document["spec"]["template"]["spec"]["volume"] = []
        with pytest.raises(validate.ValidationError):
            validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_what_manifests_mount(path: pathlib.Path) -> None:
    """Each container has the same memory at /dev/shm, and a probe asks for what has no limit."""
    yaml = pytest.importorskip("yaml", reason="not installed")
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    for container in spec["containers"]:
        (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
        (volume,) = (v for v in spec["volumes"] if v["name"] == mount["name"])
        assert volume.get("emptyDir", {}).get("medium") == "Memory" or "hostPath" in volume
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container.get(probe, {"httpGet": {"path": "/healthz"}})["httpGet"]["path"] == (
                "/healthz"
            )


def test_the_dockerfile_copies_what_is_there() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(\S+) ", text, re.M)
    assert copied == [".", "examples/deploy/app.py"]
    assert [one for one in copied if not (ROOT / one).exists()] == []
    assert re.findall(r"^USER (\S+)", text, re.M) == ["10001:10001"]  # a number


def _ask(path: str, asked: str) -> int:
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(path)
        connection.request("GET", asked)
        answer = connection.getresponse()
        answer.read()
        return answer.status


def test_what_the_image_runs(segment_name: str, tmp_path: pathlib.Path) -> None:
    """The command of the Dockerfile: four workers admit together what the limit says, and the probe
    goes on to be answered."""
    pytest.importorskip("gunicorn", reason="not installed")
    (line,) = re.findall(r"^CMD (.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.M)
    program, *arguments = json.loads(line)
    at = arguments.index("--bind") + 1
    where = f"/tmp/{segment_name}.sock"
    arguments[at] = f"unix:{where}"
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", program, *arguments],
            cwd=DEPLOY,
            env=dict(_environment(segment_name)),
            stdout=log,
            stderr=log,
        )
    try:

        def answers() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError):
                return _ask(where, "/healthz") == 200
            return False

        wait_until("it answers", answers)
        with ThreadPoolExecutor(8) as pool:
            statuses = collections.Counter(pool.map(lambda _: _ask(where, "/"), range(130)))
        assert statuses == {200: 100, 429: 30}
        assert _ask(where, "/healthz") == 200
    finally:
        server.terminate()
        server.wait(PATIENCE)
        pathlib.Path(where).unlink(missing_ok=True)


def _environment(segment_name: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "FAST_LITELLM_SHM_NAME": segment_name, "PYTHONPATH": path}
