"""What of a replica can be judged before anybody follows it: names, bounds, its SLO, its page's place and its profile.

House rules: one message says what is wrong and one hint what would be right; the configuration's replicas are judged by the same
rules as those that register.
"""

from __future__ import annotations

import re
from itertools import pairwise

from powerd.config import Config, StaticReplica
from powerd.errors import ConfigError, RequestError
from powerd.model import SloClass
from powerd.policytable import instance_policy, promise
from powerd.replicatypes import ENGINES, ReplicaRequest, SloSpec
from powerd.scrape import source_of

MAX_CLASSES = 16
_LONGEST = 1 << 30  # prompt tokens
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")


def check_replica(request: ReplicaRequest, allowed_hosts: str, profile_dir: str) -> None:
    """RequestError unless such a replica can be followed on some node."""
    for what, name in (("name", request.name), ("pool", request.pool)):
        if not _NAME.fullmatch(name):
            raise RequestError(f"{what} {name[:80]!r}: letters, digits and ._/- are needed, at most 63", code="bad_value")
    if not 1 <= request.tp <= 64:
        raise RequestError(f"tp {request.tp} is outside 1..64", code="bad_value")
    if not 1 <= request.chunk_tokens <= 1 << 20:
        raise RequestError(f"chunk_tokens {request.chunk_tokens} is outside 1..{1 << 20}", code="bad_value")
    if request.engine not in ENGINES:
        raise RequestError(f"engine {request.engine[:40]!r} is none of {', '.join(ENGINES)}", code="bad_value")
    check_slo(request.slo)
    source_of(request.metrics_url, allowed_hosts)
    if request.profile is not None:
        instance_policy(request.profile, profile_dir, request.tp, promise(request.slo.ttft_s, request.slo.tbt_s), (1,), 1.0, 1.0)


def check_slo(slo: SloSpec) -> None:
    """RequestError unless it promises something, and longer prompts no less than shorter ones."""
    if slo.ttft_s is None and slo.tbt_s is None:
        raise RequestError("slo promises nothing", hint="ttft_s, tbt_s or both", code="bad_value")
    if slo.classes and slo.ttft_s is None:
        raise RequestError("slo.classes without slo.ttft_s", hint="it is that of all longer prompts", code="bad_value")
    if len(slo.classes) > MAX_CLASSES:
        raise RequestError(f"{len(slo.classes)} slo.classes: at most {MAX_CLASSES}", code="bad_value")
    named = [(f"classes[{n}].ttft_s", each.ttft_s) for n, each in enumerate(slo.classes)]
    for what, value_s in (*named, ("ttft_s", slo.ttft_s), ("tbt_s", slo.tbt_s)):
        if value_s is not None and not 0 < value_s <= 3600:
            raise RequestError(f"slo.{what} {value_s:g} is outside 0..3600", code="bad_value")
    if slo.ttft_s is None:
        return
    for n, (each, after) in enumerate(pairwise((*slo.classes, SloClass(_LONGEST, slo.ttft_s)))):
        if not 1 <= each.max_prompt_tokens < after.max_prompt_tokens:
            what = f"slo.classes[{n}].max_prompt_tokens {each.max_prompt_tokens} is not from 1 and below that of the next"
            raise RequestError(what, hint="shortest prompts first", code="bad_value")
        if each.ttft_s > after.ttft_s:
            what = f"slo.classes[{n}].ttft_s {each.ttft_s:g} is above the {after.ttft_s:g} of longer prompts"
            raise RequestError(what, hint="shorter prompts have the shorter TTFT; slo.ttft_s is of the longest", code="bad_value")


def static_request(static: StaticReplica) -> ReplicaRequest:
    """What a ``[[replica]]`` of the configuration asks for."""
    slo = SloSpec(static.ttft_s or None, static.tbt_s or None, static.classes)
    return ReplicaRequest(
        static.name, static.pool, static.gpus, static.metrics_url, slo, static.tp, static.engine,
        static.profile or None, detached=True, chunk_tokens=static.chunk_tokens,
    )  # fmt: skip


def check_replicas(config: Config) -> None:
    """ConfigError unless every ``[[replica]]`` can be followed."""
    for static in config.replica:
        try:
            check_replica(static_request(static), config.replicas.allowed_hosts, config.replicas.profile_dir)
        except RequestError as error:
            raise ConfigError(f"replica {static.name!r}: {error.message}", hint=error.hint) from error
