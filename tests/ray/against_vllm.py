"""Ray Serve with a real vLLM on CPU behind its replicas: answers, chats, priorities under load, a kill, an orderly end.

    python -m tests.ray.against_vllm --vllm VENV/bin/vllm

House rules: Ray, planner, router and vLLM are real, its model made up (``tests.replicas.record``), the GPUs simulated: latencies
are this CPU's, energies mean nothing; loopback only; what is printed is what was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.ray.rig import MODEL, Service
from tests.replicas.record import make_model

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
START_S = 400.0
LONG, SHORT, RUNNING = (
    (1100, 300),
    (100, 20),
    (300, 1500),
)  # tokens of the prompt, which are bytes, and of the answer: classes LM, SS and ML
FLEET = """\
[planner]
listen = "{listen}"
gpus = 2
engine_model = "{model}"
policy = "static"
tick_s = 0.2
start_timeout_s = {start_s}

[policy]
tp = 2
count = 1
clock_mhz = 1980

[[groups]]
pool = "LL"
tp = 2
max_replicas = 1

[classes.ttft_s]
SS = 2.0
LM = 120.0

[engine]
command = {command}
env = {env}
chunk_tokens = 512
priorities = true
profile = "llama2-70b_h100"
num_cpus = 0.0
health_check_s = 1.0
drain_s = 40.0
start_timeout_s = {start_s}

[service]
planner = "http://{listen}"
router_cpus = 0.0
queue_timeout_s = {start_s}
tokens_per_character = 1.0
powerd_socket = "{socket}"
"""


class Heard(NamedTuple):
    """One answer: seconds to its first text and to its end, its text, tokens as vLLM counts them, what went wrong."""

    first_s: float
    end_s: float
    text: str
    tokens: int
    error: str


class VllmService(Service):
    """The service of the tests with one replica, which starts vLLM."""

    def __init__(self, vllm: str, folder: Path) -> None:
        self._vllm, self._folder = vllm, folder
        super().__init__()

    def _toml(self) -> str:
        template = self._folder / "chat.jinja"
        template.write_text(TEMPLATE)
        command = [
            self._vllm, "serve", str(self._folder), "--load-format=dummy", "--served-model-name=tiny", "--dtype=bfloat16",
            "--max-model-len=2048", "--max-num-seqs=4", "--host=127.0.0.1", "--port={port}", "--shutdown-timeout=20",
            "--scheduling-policy=priority", "--max-num-batched-tokens={chunk_tokens}", f"--chat-template={template}",
        ]  # fmt: skip
        # The simulated driver is for powerd: vLLM shall not take this machine for one with GPUs.
        env = ", ".join(f'{key} = "{value}"' for key, value in {**OFFLINE, "LD_LIBRARY_PATH": "", "LD_PRELOAD": ""}.items())
        return FLEET.format(listen=self._planner_at, model=MODEL, command=json.dumps(command), env="{" + env + "}",
                            socket=self.live.socket, start_s=START_S)  # fmt: skip

    def engines(self) -> list[int]:
        """The processes of vLLM, the server first."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if (
                    b"serve" in words
                    and str(self._folder).encode() in words
                    and b"powerd_integrations.ray_serve.leash" not in words
                ):
                    found.append(int(entry.name))
        return sorted(found)


def hear(port: int, path: str, body: dict[str, Any]) -> Heard:
    """Ask and read the whole answer, streamed or not."""
    began, first_s, text, tokens, error = time.monotonic(), 0.0, "", 0, ""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps({"model": "tiny", "ignore_eos": True, "temperature": 0.0, **body}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            for document in _documents(answer, bool(body.get("stream"))):
                error = error or json.dumps(document["error"]) if "error" in document else error
                tokens = (document.get("usage") or {}).get("completion_tokens", tokens)
                for choice in document.get("choices", ()):
                    part = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                    first_s = first_s or (time.monotonic() - began if part else 0.0)
                    text += part
    except OSError as problem:
        error = str(problem)
    return Heard(first_s, time.monotonic() - began, text, tokens, error)


def _documents(answer: Any, streams: bool) -> Iterator[dict[str, Any]]:
    if not streams:
        yield json.loads(answer.read())
        return
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def completion(port: int, kind: tuple[int, int], seed: int) -> Heard:
    """A streamed completion of a kind; no two prompts begin alike."""
    prompt = (f"{seed:03d} " + "abcdefg " * 200)[: kind[0]]
    body = {"prompt": prompt, "max_tokens": kind[1], "stream": True, "stream_options": {"include_usage": True}}
    return hear(port, "/v1/completions", body)


def answers(service: VllmService) -> None:
    """The same text through Ray and from vLLM itself, as completion and as chat, streamed and whole."""
    words = (Path("/proc") / str(service.engines()[0]) / "cmdline").read_text().split("\0")
    own = int(next(word for word in words if word.startswith("--port=")).partition("=")[2])
    chat = {"messages": [{"role": "user", "content": "What is a watt?"}], "max_tokens": 24}
    for name, path, body in (
        ("completion", "/v1/completions", {"prompt": "a watt is", "max_tokens": 24}),
        ("chat", "/v1/chat/completions", chat),
    ):
        for stream in (True, False):
            asked = {**body, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
            through, direct = hear(service.port, path, asked), hear(own, path, asked)
            same = through.text == direct.text and through.tokens == direct.tokens == 24 and not through.error
            how = "streamed" if stream else "whole"
            print(f"{name}, {how}: {through.tokens} tokens, as from vLLM itself: {same} {through.error}")


def priorities(service: VllmService) -> None:
    """Long prompts with time first, short ones in a hurry a second later: who has the first token when."""
    with ThreadPoolExecutor(32) as pool:
        began = time.monotonic()
        long = [pool.submit(completion, service.port, LONG, n) for n in range(16)]
        time.sleep(1.0)
        sent_s = time.monotonic() - began
        short = [pool.submit(completion, service.port, SHORT, 100 + n) for n in range(4)]
        firsts = [found.result().first_s for found in long]
        hurried = [found.result() for found in short]
    late = [first_s for first_s in firsts if first_s > sent_s]
    behind = sum(first_s > sent_s + max(one.first_s for one in hurried) for first_s in late)
    print(
        f"priorities: {len(late)} of {len(firsts)} long ones waited when {len(hurried)} short ones came; {behind} of these began "
        f"after every short one; first tokens of the short ones after {max(one.first_s for one in hurried):.1f} s at most, of "
        f"the long ones after {max(firsts):.1f} s; errors: {[one.error for one in hurried if one.error]}"
    )


def kill(service: VllmService) -> None:
    """vLLM's server is killed in mid-answer: what becomes of the answers, and how long until the next replica serves."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(completion, service.port, RUNNING, 200 + n) for n in range(3)]
        time.sleep(1.0)
        before, running = service.engines(), sum(not found.done() for found in asked)
        os.kill(before[0], signal.SIGKILL)
        began = time.monotonic()
        heard = [found.result() for found in asked]
    print(
        f"killed: {running} answers ran; {sum(not one.error for one in heard)} of {len(heard)} came to their end at the replica "
        f"that was started instead, after {time.monotonic() - began:.0f} s; it counts {[one.tokens for one in heard]} of "
        f"{RUNNING[1]} tokens as its own; errors: {[one.error for one in heard if one.error]}; "
        f"processes left of the killed one: {len(set(before) & set(service.engines()))}"
    )


def end(service: VllmService) -> None:
    """Serve ends while an answer runs."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(completion, service.port, RUNNING, 300)
        time.sleep(1.0)
        service.stop_ray()
        found = asked.result()
    _until(lambda: not service.engines(), 30)
    print(
        f"ended while an answer ran: it was {'finished' if found.tokens else 'cut off'}; processes of vLLM left: "
        f"{len(service.engines())}; replicas at powerd: {len(service.live.client.replicas())}"
    )


def _until(done: Callable[[], bool], within_s: float) -> None:
    end_s = time.monotonic() + within_s
    while not done():
        if time.monotonic() > end_s:
            sys.exit(f"not within {within_s:g} s")
        time.sleep(0.2)


def main() -> None:
    """Serve, ask, hurry, kill, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True, help="the program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        with VllmService(str(Path(args.vllm).absolute()), Path(folder)) as service:
            _until(lambda: bool(service.plan().serving), START_S)
            _until(lambda: len(service.live.client.replicas()) == 1, 30)
            (view,) = service.live.client.replicas()
            print(f"{service.plan().serving[0].id} serves; powerd: {view.state}, {view.reason}", flush=True)
            for act in (answers, priorities, kill, end):
                act(service)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
