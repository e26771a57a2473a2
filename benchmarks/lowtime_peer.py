"""lowtime 0.3.0, unmodified, on one problem: a program for the peers' environment, run by perseus_speed in a process of its own.

House rules: it imports nothing of ours; a problem as JSON on stdin, plans as JSON on the last line of stdout, progress on stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import time


def main() -> int:
    """Walk lowtime's frontier from the slowest plan down; every so often note which options it would use."""
    import networkx as nx
    from lowtime.cost_model import ExponentialModel
    from lowtime.operation import CandidateExecutionOptions, DummyOperation, ExecutionOption, Operation, OperationSpec
    from lowtime.solver import PhillipsDessouky

    logging.disable(logging.CRITICAL)
    problem = json.load(sys.stdin)
    begin = time.process_time()
    specs = []
    for table in problem["tables"]:
        options = [
            ExecutionOption(real_time=time_s, unit_time=problem["unit_s"], cost=cost_j, knob=index)
            for index, (time_s, cost_j) in enumerate(table)
        ]
        candidates = CandidateExecutionOptions(options=options)
        specs.append(OperationSpec(options=candidates, cost_model=ExponentialModel(candidates)))
    dag = nx.DiGraph()
    operations = [Operation(spec=specs[index]) for index in problem["table"]]
    count = len(operations)
    for node, operation in enumerate(operations):
        dag.add_node(node, op=operation)
    dag.add_edges_from(map(tuple, problem["edges"]))
    source, sink = count, count + 1
    dag.add_node(source, op=DummyOperation())
    dag.add_node(sink, op=DummyOperation())
    for node in range(count):
        if not problem_degree(dag.in_degree, node):
            dag.add_edge(source, node)
    for node in range(count):
        if not problem_degree(dag.out_degree, node):
            dag.add_edge(node, sink)
    dag.graph["source_node"], dag.graph["sink_node"] = source, sink
    plans = []
    iterations = 0
    spent = None
    for result in PhillipsDessouky(dag).run():
        iterations = result.iteration + 1
        if iterations % problem["sample_every"] == 0:
            plans.append([operation.assigned_knob for operation in operations])
            print(f"\rlowtime: {iterations} iterations", end="", file=sys.stderr, flush=True)
        if problem["iterations"] and iterations >= problem["iterations"]:
            spent = time.process_time() - begin
            break
    finished = spent is None
    plans.append([operation.assigned_knob for operation in operations])
    cpu_s = time.process_time() - begin if spent is None else spent
    print(file=sys.stderr)
    print(json.dumps({"cpu_s": cpu_s, "iterations": iterations, "finished": finished, "plans": plans}))
    return 0


def problem_degree(degree: object, node: int) -> int:
    """networkx' degree of one node."""
    return int(degree[node])  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
