"""A service on real Ray Serve: simulated engines on a simulated node that powerd controls, the live planner, and clients.

House rules: Ray is a process of the fourth environment and listens on loopback only; the planner is a process too, with the file
that a user would write: DynamoLLM's own controller decides, only its periods are seconds; every request has a number, and what
became of it is kept; whatever is started here is ended here, by its id.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from powerd_integrations.fleet import scrape
from powerd_integrations.fleet.published import PublishedPlan, from_json
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import InstanceLoad
from tests.e2e.live import LiveNode, command, free_port, wait_for
from tests.rayenv import ROOT, ray_python, source_path

JOBS = Path(__file__).parent / "jobs"
LOOPBACK = Path(__file__).parent / "loopback"
GPUS = 8
MODEL = ROOT / "policies" / "profiles" / "llm" / "llama2-70b_h100.engine.csv"
POOL = "LL"  # of the partition "one"
TTFT_S, TBT_S = 5.0, 1.0  # of two shared cores, not of an H100
STRICT = "LM"  # long prompts, middling answers: promised a pace that no replica on two GPUs keeps (modelled)
STRICT_TBT_S = 0.1

FLEET = """\
[planner]
listen = "{listen}"
gpus = {gpus}
engine_model = "{model}"
stale_after_s = 4.0
gone_after_s = 6.0
tick_s = 0.2
start_s = 4.0
start_timeout_s = 60.0
settle_s = 1.5

[policy]              # as published, in seconds instead of minutes
cluster_s = 8.0
pool_s = 4.0
period_s = 0.5
warmup_s = 3.0
young_s = 4.0
fast_s = 3.0
surge_s = 3.0
ahead_s = 1.0
dwell_s = 1.0
tp = 4

[forecast]
bin_s = 1.0
level_s = 5.0
peak_s = 5.0

[[groups]]
pool = "LL"
tp = 2
max_replicas = 4

[[groups]]
pool = "LL"
tp = 4
max_replicas = 2

[classes.ttft_s]
{ttft}
[classes.tbt_s]
{tbt}
[engine]
command = {command}
metrics_url = "http://127.0.0.1:{{metrics_port}}/metrics"
profile = "llama2-70b_h100"
num_cpus = 0.0
health_check_s = 1.0
drain_s = 30.0
start_timeout_s = 60.0

[service]
planner = "http://{listen}"
router_cpus = 0.0
powerd_socket = "{socket}"
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    number: int
    status: int
    tokens: int
    whole: bool
    ttft_s: float
    worst_gap_s: float
    error: str = ""

    @property
    def within_slo(self) -> bool:
        return self.status == 200 and self.whole and self.ttft_s <= TTFT_S and self.worst_gap_s <= TBT_S


def node(gpus: int) -> LiveNode:
    """A node with powerd, which soon calls a replica idle or stale."""
    return LiveNode(gpus=gpus, model="h100-sxm", more="[replicas]\nstale_s = 2\npark_after_s = 1\ngood_scrapes = 2\n")


class Service:
    """The whole service; use as a context manager."""

    gpus = GPUS  # of its node

    def __init__(self) -> None:
        self.live = node(self.gpus)
        self.port = free_port()
        self._planner_at = f"127.0.0.1:{free_port()}"
        self._numbers = iter(range(10**6))
        self._clients = ThreadPoolExecutor(64, thread_name_prefix="client")
        self._planner: subprocess.Popen[bytes] | None = None
        self._ray: subprocess.Popen[str] | None = None
        self.config = self.live.root / "fleet.toml"
        self.log, self.planner_log = self.live.root / "ray.log", self.live.root / "planner.log"
        try:
            self.config.write_text(self._toml())
            with self.planner_log.open("ab") as log:
                argv = [sys.executable, "-m", "powerd_integrations.fleet", str(self.config)]
                self._planner = subprocess.Popen(argv, env=self.live.env, cwd=self.live.root, stdin=subprocess.DEVNULL,
                                                 stdout=log, stderr=log, start_new_session=True)  # fmt: skip
            with self.log.open("ab") as log:
                argv = [
                    str(ray_python()),
                    str(JOBS / "serve_job.py"),
                    str(self.config),
                    str(self.live.root / "ry"),
                    str(self.port),
                    str(self.gpus),
                ]
                env = {**self.live.env, "PYTHONPATH": f"{LOOPBACK}{os.pathsep}{source_path()}"}
                self._ray = subprocess.Popen(argv, env=env, cwd=self.live.root, text=True, stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, stderr=log, start_new_session=True)  # fmt: skip
            self.address = str(self._hear()["address"])  # of Ray, when all is ready
        except BaseException:
            self.close()
            raise

    def _toml(self) -> str:
        # The engine is powerd's own and runs in powerd's environment; Ray's has only what a service's image would have.
        tbt_s = {**dict.fromkeys(NAMES, TBT_S), STRICT: STRICT_TBT_S}
        return FLEET.format(
            gpus=GPUS, model=MODEL, command=self._engine(), listen=self._planner_at, socket=self.live.socket,
            ttft="\n".join(f"{name} = {TTFT_S}" for name in NAMES),
            tbt="\n".join(f"{name} = {value}" for name, value in tbt_s.items()),
        )  # fmt: skip

    def _engine(self) -> str:
        """What starts an engine, as a file has it."""
        job = [sys.executable, str(JOBS / "engine_job.py"), str(self.live.root), "{id}", "{metrics_port}", "{port}"]
        engine = [*command("powerd", "sim", "engine"), "--model", "llama2-70b_h100", "--gpus", "{gpus}", "--tp", "{tp}",
                  "--shutdown-timeout", "20"]  # fmt: skip
        return json.dumps([*job, *engine])

    # --- Ray ------------------------------------------------------------------------------------------------------------------

    def _hear(self) -> dict[str, Any]:
        assert self._ray is not None
        assert self._ray.stdout is not None
        for line in self._ray.stdout:
            if line.startswith('{"'):
                return dict(json.loads(line))
        raise AssertionError(f"Ray's driver ended: {self.log.read_text()[-6000:]}")

    def ask(self, word: str) -> dict[str, Any]:
        """Tell the driver something; its answer."""
        assert self._ray is not None
        assert self._ray.stdin is not None
        self._ray.stdin.write(word + "\n")
        self._ray.stdin.flush()
        return self._hear()

    def replica_pids(self) -> dict[str, int]:
        """The processes of the engine replicas that run, by Serve's id."""
        rows = self.ask("replicas")["replicas"]
        return {row["id"]: row["pid"] for row in rows if row["deployment"].startswith("engine-") and row["state"] == "RUNNING"}

    # --- planner --------------------------------------------------------------------------------------------------------------

    def _told(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self._planner_at}{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def plan(self) -> PublishedPlan:
        """The plan in force, as routers and autoscalers read it."""
        return from_json(self._told("/v1/plan"))

    def events(self) -> list[tuple[str, str, str]]:
        """What the policy and the hand-over say that they did: kind, subject, detail."""
        return [(row["kind"], row["subject"], row["detail"]) for row in self._told("/v1/events")["events"]]

    def serving(self) -> dict[int, int]:
        """Replicas that serve by tensor parallelism, as the planner sees them."""
        return dict(Counter(replica.group.tp for replica in self.plan().serving))

    def wait_serving(self, counts: dict[int, int], timeout_s: float = 30.0) -> None:
        """Wait until exactly so many replicas of each tensor parallelism serve."""
        try:
            wait_for(f"{counts} serve", lambda: self.serving() == counts, timeout_s)
        except AssertionError:
            print(self.story(), file=sys.stderr)
            raise

    def story(self) -> str:
        """What is known when something did not come."""
        return f"{self.plan()}\n{self.events()}\n{self.planner_log.read_text()[-2000:]}\n{self.log.read_text()[-3000:]}"

    # --- clients --------------------------------------------------------------------------------------------------------------

    def send(self, tokens: int = 20, prompt: int = 1000) -> Future[Outcome]:
        """Send one request; what becomes of it."""
        return self._clients.submit(self._request, next(self._numbers), tokens, prompt)

    def run_load(self, rate: float, seconds: float, tokens: int = 20, prompt: int = 1000) -> list[Future[Outcome]]:
        """Send ``rate`` requests a second for ``seconds``; open loop, as users do."""
        begun, sent = time.monotonic(), []
        for number in range(max(1, int(rate * seconds))):
            threading.Event().wait(max(0.0, begun + number / rate - time.monotonic()))
            sent.append(self.send(tokens, prompt))
        threading.Event().wait(max(0.0, begun + seconds - time.monotonic()))
        return sent

    def load_until(
        self, done: Callable[[], bool], rate: float, tokens: int = 20, prompt: int = 1000, at_most_s: float = 60.0
    ) -> list[Future[Outcome]]:
        """Send ``rate`` requests a second until something is so; AssertionError when it does not come."""
        sent, end_s = [], time.monotonic() + at_most_s
        while not done():
            assert time.monotonic() < end_s, f"not within {at_most_s:g} s: {self.story()}"
            sent += self.run_load(rate, max(1.0, 1.0 / rate), tokens, prompt)
        return sent

    def open(self, tokens: int) -> http.client.HTTPResponse:
        """A stream that the test reads itself."""
        body = json.dumps({"prompt": "tok " * 50, "max_tokens": tokens, "stream": True}).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        link.request("POST", "/v1/completions", body, {"Content-Type": "application/json", "Connection": "close"})
        return link.getresponse()

    def engine_page(self, pid: int) -> Callable[[], InstanceLoad]:
        """How the load of an engine's process is read: from its own page."""
        words = (Path(f"/proc/{pid}") / "cmdline").read_text().split("\0")
        url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/metrics"
        return lambda: scrape.load_of(scrape.fetch(url, 0.0))

    def _request(self, number: int, tokens: int, prompt: int) -> Outcome:
        body = {"prompt": "tok " * 50, "max_tokens": tokens, "stream": True}
        headers = {"Content-Type": "application/json", "X-Request-Id": str(number), "X-Prompt-Tokens": str(prompt)}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        begun = last = time.monotonic()
        seen, ttft_s, worst_s, whole, error = 0, 0.0, 0.0, False, ""
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
                for line in answer:
                    if line.startswith(b"data: [DONE]"):
                        whole = True
                    elif line.startswith(b"data: ") and b'"error"' in line:
                        error = line.decode()
                    elif line.startswith(b"data: "):
                        now = time.monotonic()
                        words = str(json.loads(line[6:])["choices"][0]["text"]).split()
                        if words:
                            ttft_s = ttft_s or now - begun
                            worst_s, last = (max(worst_s, now - last) if seen else 0.0), now
                        seen += len(words)
            return Outcome(number, 200, seen, whole, ttft_s, worst_s, error)
        except urllib.error.HTTPError as problem:
            return Outcome(number, problem.code, seen, False, ttft_s, worst_s, problem.read().decode())
        except OSError as problem:
            return Outcome(number, 0, seen, False, ttft_s, worst_s, str(problem))

    # --- end ------------------------------------------------------------------------------------------------------------------

    def stop_ray(self) -> None:
        """End the service as an operator does: Serve first, then Ray."""
        if self._ray is None:
            return
        if self._ray.poll() is None:
            try:
                self.ask("stop")
            except (AssertionError, OSError):
                pass
            try:
                self._ray.wait(20)
            except subprocess.TimeoutExpired:
                pass
        for pid in self.ray_pids():  # also what a failed test left; they share the driver's session
            os.kill(pid, signal.SIGKILL)
        if self._ray.poll() is None:
            self._ray.kill()
            self._ray.wait()
        self._ray = None

    def ray_pids(self) -> list[int]:
        """Every process of this service's Ray, by the folder that it was told to use."""
        mark, found = str(self.live.root / "ry").encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "cmdline").read_bytes() or mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def close(self) -> None:
        """End everything."""
        self.stop_ray()
        if self._planner is not None:
            self._planner.terminate()
            self._planner.wait(20)
        self._clients.shutdown(wait=False, cancel_futures=True)
        self.live.close()
        shutil.rmtree(self.live.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
