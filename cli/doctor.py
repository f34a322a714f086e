"""`edgellama doctor`: what edgellama finds here, as a list to read or to paste into a report."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from edgellama.cli.environment import problems
from edgellama.cli.terminal import Terminal
from edgellama.doctor import Findings, examine


def show_findings(terminal: Terminal) -> None:
    """The status is 0 whatever is found: the problems are the result."""
    from edgellama.cli.main import app

    found = examine()
    found.problems += problems(get_command(app).commands)  # type: ignore[attr-defined]
    if terminal.json:
        terminal.document(document(found))
        return
    for title, lines in _sections(found):
        terminal.write(f"{title}\n")
        for label, text in lines:
            terminal.write_lines(f"  {label:<20} {text}\n")
    terminal.write("problems\n")
    for problem, advice in found.problems:
        terminal.write_lines(f"  - {problem}\n    {advice}\n")
    if not found.problems:
        terminal.write("  none\n")


def document(found: Findings) -> dict[str, Any]:
    """For --json: the fields of Findings; a problem is `problem` and `advice`."""
    told = [{"problem": problem, "advice": advice} for problem, advice in found.problems]
    return dataclasses.asdict(found) | {"problems": told}


def _sections(found: Findings) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    absent = "not installed"
    yield "versions", [(name, version or absent) for name, version in found.versions.items()]
    yield "processor", list(_processor(found.processor))
    yield "memory", [(name, _size(n)) for name, n in found.memory.items()]
    yield "caches", list(_caches(found.caches))
    yield "ONNX Runtime", [(name, _plain(value)) for name, value in found.onnx.items()]
    yield "network", list(_network(found.network))
    if found.environment:
        yield "environment", list(found.environment.items())


def _processor(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", facts["name"]
    cores = f"{facts['threads']} threads by default: {facts['logical']} logical cores"
    allowed = "" if facts["allowed"] is None else f", {facts['allowed']} allowed"
    quota = "no quota" if facts["quota"] is None else f"a quota of {facts['quota']}"
    yield "cores", f"{cores}{allowed}, {quota}"
    yield "features", _plain(facts["features"])
    yield "levels", _plain(facts["levels"])
    if facts["level"]:
        yield "level in use", f"{facts['level']}: {facts['reason']}"


def _caches(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "root", _plain(facts["root"])
    if facts["root"] is None:
        return
    for kind in ("models", "kernels"):
        folder = facts[kind]
        state = "" if folder["writable"] else ", not writable"
        yield kind, f"{folder['files']} files, {_size(folder['bytes'])}{state}"
    yield "model names", _plain(facts["models"]["names"])
    kernels = facts["kernels"]
    others = f", and {kernels['stale']} of other releases" if kernels.get("stale") else ""
    yield "compiled kernels", f"{kernels.get('compiled', 0)}{others}"
    if kernels.get("shipped"):
        yield "shipped kernels", kernels["shipped"]


def _network(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for at, user in enumerate(facts["used_by"]):
        yield ("used by" if at == 0 else ""), user
    yield "HF_HUB_OFFLINE", facts["hub_offline"] or "not set"
    yield "telemetry", facts["telemetry"]


def _size(n: int | None) -> str:
    return "unknown or unlimited" if n is None else f"{n / 1e6:,.1f} MB"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
