"""``powerctl dynamollm``: replay a trace under policies, profile an endpoint. Solvers are imported when a command needs them."""

from __future__ import annotations

import typer

app = typer.Typer(help="DynamoLLM: replicas, tensor parallelism and clocks under latency targets.", no_args_is_help=True)
