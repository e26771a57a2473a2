"""``python -m powerd.cli.reference``: docs/powerctl.md, made from the verbs themselves.

House rules: nothing here describes a verb; a test holds the page to what this prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from powerd.cli.main import build
from powerd.errors import (
    EXIT_CONFIG,
    EXIT_CONFLICT,
    EXIT_DENIED,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_OVERRIDDEN,
    EXIT_TEMPFAIL,
    EXIT_TIMEOUT,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
)

HEAD = """\
# powerctl

`powerctl` is the client for people and scripts. This page is printed by `python -m powerd.cli.reference`.

- Every read verb has `--json` (the types of `powerd.api`), every write verb `--dry-run`.
- Results go to stdout; an error is one line on stderr that says what to do.
- Quantities carry their unit: `300W`, `0.3kW`, `1200MHz`, `1.2GHz`, `10m`, `1h30m`. A plain number is refused.
- A GPU is named by index, UUID or a unique UUID prefix. Without a name, `run`, `energy` and `sweep` take the GPUs visible
  to the command (`CUDA_VISIBLE_DEVICES`, `LOCAL_RANK`, containers, Slurm).
- What comes from a simulated node says "simulated".
"""

MEANINGS = {
    EXIT_OK: "done; also when a clock is set and will show under load",
    EXIT_FAILURE: "something else went wrong; `doctor`: a problem was found",
    EXIT_USAGE: "the command line or a value in it is wrong",
    EXIT_OVERRIDDEN: "accepted by the driver, but something overrides it",
    EXIT_CONFLICT: "not served because of another want, or the lease was lost",
    EXIT_UNAVAILABLE: "no daemon, or no driver",
    EXIT_TEMPFAIL: "try again",
    EXIT_DENIED: "not allowed, or powerd only monitors",
    EXIT_CONFIG: "bad configuration",
    EXIT_TIMEOUT: "no answer in time",
}

SWEEP = """\
## How sweep measures

Once per clock (default): the command runs from start to end at every clock; its time is that of the energy window around it.
For commands that take seconds to minutes and whose start-up is short against that.

Steady (`--steady`): the command starts once and appends a line per iteration to the file named in `POWERD_SWEEP_PROGRESS`:

    with open(os.environ["POWERD_SWEEP_PROGRESS"], "a") as progress:
        progress.write("step\\n")

At every clock two iterations pass unmeasured, then whole iterations are timed for `--seconds-per-clock` (of the node's time) or
`--iterations`. The command is ended with SIGTERM when the last clock is done.

Both write a CSV in the field's profile format `stage,instruction,frequency,time,energy` (MHz, s, J per execution, all GPUs
together) and a JSON beside it with the 95 % bounds per GPU. Rows are written as they are measured: the same command line again
goes on where it broke off. The reference of "slowdown" and "saving" is the highest clock measured.
"""


def _verbs(command: Any, path: str, parent: Any) -> Iterator[tuple[str, Any, Any]]:
    context = command.context_class(
        command, info_name=path.rsplit(" ", 1)[-1], parent=parent, terminal_width=100, max_content_width=100
    )
    yield path, command, context
    for name, verb in getattr(command, "commands", {}).items():
        yield from _verbs(verb, f"{path} {name}", context)


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, "## Exit codes\n\n" + "\n".join(f"- `{code}`: {meaning}" for code, meaning in MEANINGS.items()) + "\n"]
    parts.append(
        "`run` and `energy` end with their command's own code; `128 + n` when signal n ended it, `127` when it was not found.\n"
    )
    root = typer.main.get_command(build())
    for path, command, context in _verbs(root, "powerctl", None):
        text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
        parts.append(f"## {path}\n\n```text\n{text}\n```\n")
        if path == "powerctl sweep":
            parts.append(SWEEP)
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
