"""A fleet of LLM engines with continuous batching, simulated iteration by iteration: modelled, deterministic, fast.

House rules: ``engine_model.Coefficients`` is the law of time and energy, nothing here adds a figure of its own but what
``ClusterConfig`` names; a tie is decided by order, never by chance; energy is of GPUs that an instance has, those that are off
stand apart.

**Engine.** A first-come queue (by deadline where a plan reorders it). Every iteration decodes one token of each running request
and gives the rest of its chunk (``chunk_of`` its TP, fixed when it starts) to prompts: first the one already begun, then the
queue's head. The head is admitted when fewer than ``max_running`` are and when its prompt and its whole answer fit into the KV
cache beside those of the others: nothing is preempted, nobody overtakes the head. A first token comes at the end of the iteration
that computes the last of its prompt, one more at the end of each iteration after it. Iterations are rounded to nanoseconds.

**Energy.** The prompt's part of an iteration belongs to its requests by their prompt tokens, the rest to those that decode, in
equal parts. A clock change holds up the next iteration by ``clock_set_s`` at the watts of decode; when idle, the next arrival.

**Router.** For a request's class as predicted, with ``p`` prompt tokens, at each instance that serves:

- ``outstanding`` = prompt tokens of the requests there without a first token (whole prompts, however much of them is computed);
  ``decoding`` = requests there with a first token and not finished; ``unfinished`` = all requests there;
- ``tokens = outstanding + p``; ``iterations = ceil(tokens / (chunk - decoding))``, its own chunk;
- ``wait_s = iterations * (max(prefill_fixed_s, decode_fixed_s if decoding else 0) + decode_request_s * decoding)
  + prefill_token_s * tokens``, with the coefficients of the clock last asked for.

Of the route's pools in order, in the first that has an instance with ``wait_s`` within the class's TTFT: of these the one with
the fewest ``outstanding``; ties: the lowest ``unfinished / kv_tokens``, then the plan's order. If there is none in any pool: the
one with the least ``wait_s`` of all the route's, ties by route and plan order. If none serves: the request waits outside, and all
that wait are placed in order of arrival when an instance begins to serve or a plan is applied. An instance whose whole KV cache
is smaller than prompt and answer rejects the request that it is sent.

**Changes.** A plan's new instances take GPUs at once if they are free and draw idle watts while they start (``start_s``). Those
that take the place of drained ones in the same plan wait for these GPUs and need ``reshard_s``. Drained instances get no more
requests and end when they are empty. Order at one moment: iterations end, instances begin and end, requests arrive, plans apply,
iterations begin.
"""

from powerd.sim.cluster.cluster import Cluster
from powerd.sim.cluster.inputs import ClusterConfig, Requests
from powerd.sim.cluster.plancheck import PlanError
from powerd.sim.cluster.results import Results

__all__ = ["Cluster", "ClusterConfig", "PlanError", "Requests", "Results"]
