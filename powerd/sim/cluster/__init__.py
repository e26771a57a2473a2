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

**Roles.** Instances of role ``prefill`` take arrivals as those of both do (the router's rule is the same, ``decoding`` is 0),
but every request leaves them with its first token; what it reserves there is its prompt, until its KV cache has left. It goes
to an instance of role ``decode`` in the same pool that serves and has room for prompt and answer and for one request more
(``max_running`` counts those on their way): the one with the fewest requests, ties: the least KV cache reserved, then the
plan's order. Where none has room it waits, and nobody of its pool overtakes it; it is rejected when its prompt and answer are
more than the whole KV cache of any of them. The move takes ``ClusterConfig.links.move_s(prompt)``; the request is in the first
iteration that begins afterwards. Its first token is the prefill instance's, and the gap before its second one is all of the
time in between. Cut off (``drain_limit_s``), a prefill instance takes with it what it still holds; what was on its way to a
decode instance looks for another one.

**Changes.** A plan's new instances take GPUs at once if they are free and draw idle watts while they start (``start_s``). Those
that take the place of drained ones in the same plan wait for these GPUs and need ``reshard_s``. Drained instances get no more
requests and end when they are empty. Order at one moment: iterations end, KV caches arrive, instances begin and end, KV caches
set off, requests arrive, plans apply, iterations begin.
"""

from powerd.sim.cluster.cluster import Cluster
from powerd.sim.cluster.inputs import ClusterConfig, Requests
from powerd.sim.cluster.plancheck import PlanError
from powerd.sim.cluster.results import Results

__all__ = ["Cluster", "ClusterConfig", "PlanError", "Requests", "Results"]
