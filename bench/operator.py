"""How much the operator costs: FineTuneJobs on a real API server, interleaved with a bare script that writes the same objects.

Prints figures as it goes and one JSON object as its last line; appends them to bench/RESULTS.md. Needs an API server with a
controller-manager and without nodes: `dev/cluster/cluster up --control-plane-only` is brought up unless KUBECONFIG is given.

    python bench/operator.py [--count 1000] [--rounds 4] [--edits 60] [--idle 30] [--no-record]
"""

from __future__ import annotations

import sys

# Not this file's folder, where it would stand before the standard library's `operator`.
_ROOT = __file__.rpartition("/bench/")[0]
sys.path[:] = [_ROOT, *(f"{_ROOT}/{folder}" for folder in ("operator", "trainer_image", "gateway_image")), *sys.path[1:]]

import argparse  # noqa: E402
import asyncio  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Awaitable, Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import aiohttp  # noqa: E402
import yaml  # noqa: E402
from tests.cluster.harness import ROOT, OperatorProcess, wait_for  # noqa: E402

from tuneloop_operator.cluster.credentials import load_credentials  # noqa: E402
from tuneloop_operator.cluster.errors import NotFound  # noqa: E402
from tuneloop_operator.cluster.kinds import KINDS  # noqa: E402
from tuneloop_operator.cluster.transport import APPLY, MERGE, Transport  # noqa: E402

Object = dict[str, Any]
WRITERS = 8
"""Requests in flight, of the bare script as of the operator (settings.workers)."""
WATCHED, BARE = "bench-operator", "bench-bare"
KEPT = ("apiVersion", "kind", "data", "spec")


def fine_tune_job(namespace: str, number: int) -> Object:
    source = {"source": {"uri": "pvc://models/train.jsonl"}, "template": {"prompt": "{{ text }}", "completion": "{{ label }}"}}
    return {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": f"job-{number:05}", "namespace": namespace},
        "spec": {
            "baseModel": {"uri": "pvc://models/base"},
            "data": {"train": [source]},
            "compute": {"pod": {"schedulerName": "nobody"}},
            "output": {"model": f"model-{number:05}", "store": {"uri": "pvc://models/store"}},
        },
    }


class Bench:
    """One run on one API server."""

    def __init__(self, kubeconfig: str, options: argparse.Namespace, folder: Path) -> None:
        self.kubeconfig = kubeconfig
        self.options = options
        self.api = Transport(load_credentials({"KUBECONFIG": kubeconfig}))
        self.log = folder / "operator.log"
        self.figures: dict[str, float] = {}
        self.operator: OperatorProcess | None = None

    async def run(self) -> dict[str, float]:
        await self.prepare()
        try:
            self.start()
            await asyncio.sleep(8)  # its start, with the first sweep, is no part of the work per object
            await self.interleave()
            await self.stay_idle()
            await self.edit()
            await self.restart()
        finally:
            if self.operator is not None:
                self.operator.stop()
            await self.clean()
            await self.api.close()
        return self.figures

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    # --- before and after ---

    async def prepare(self) -> None:
        for path in sorted((ROOT / "crds").glob("*.yaml")):
            crd = yaml.safe_load(path.read_text())
            url = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
            await self.api.request("apply", "PATCH", url, query={"fieldManager": "bench", "force": "true"}, body=crd, content_type=APPLY)
        await self.clean()
        for namespace in (WATCHED, BARE):
            await self.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
            spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
            claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": spec}
            await self.post(KINDS["PersistentVolumeClaim"].path(namespace), claim)

    async def clean(self) -> None:
        """Deletes the namespaces, and waits until they are gone."""
        for namespace in (WATCHED, BARE):
            while True:
                try:
                    await self.api.request("delete", "DELETE", f"/api/v1/namespaces/{namespace}")
                except NotFound:
                    break
                except Exception:  # noqa: BLE001 - 409 while it is being deleted
                    pass
                await asyncio.sleep(1)

    def start(self) -> None:
        self.operator = OperatorProcess(self.kubeconfig, WATCHED, self.log, "bench")
        self.operator.start()
        wait_for(lambda: self.operator is not None and self.operator.metric("tuneloop_operator_leader") == 1)

    async def post(self, path: str, body: Object) -> Object:
        return await self.api.request("create", "POST", path, body=body)

    # --- the rounds ---

    async def interleave(self) -> None:
        """Rounds of both by turns, so that whatever else the machine does strikes both."""
        rounds, count = self.options.rounds, self.options.count
        operator_seconds = bare_seconds = cpu = 0.0
        for turn in range(rounds):
            numbers = range(turn * count // rounds, (turn + 1) * count // rounds)
            before = self.cpu_seconds()
            operator_seconds += await self.timed(lambda n=numbers: self.by_operator(n))  # type: ignore[misc]
            cpu += self.cpu_seconds() - before
            samples = await self.samples(f"job-{numbers[0]:05}")
            bare_seconds += await self.timed(lambda n=numbers, s=samples: self.by_script(n, s))  # type: ignore[misc]
            done = numbers[-1] + 1
            self.say(f"{done} jobs: operator {done / operator_seconds:.1f}/s, bare script {done / bare_seconds:.1f}/s, {cpu:.1f} CPU s")
        self.figures |= {
            "crs_per_second": round(count / operator_seconds, 1),
            "bare_apply_crs_per_second": round(count / bare_seconds, 1),
            "ratio": round(bare_seconds / operator_seconds, 2),
            "cpu_seconds_per_1000": round(cpu * 1000 / count, 2),
            "rss_mib": self.peak_mib(),
        }

    async def timed(self, work: Callable[[], Awaitable[None]]) -> float:
        started = time.monotonic()
        await work()
        return time.monotonic() - started

    async def by_operator(self, numbers: range) -> None:
        """Makes jobs, and waits until the last of their children is there."""
        await each(numbers, lambda n: self.post(KINDS["FineTuneJob"].path(WATCHED), fine_tune_job(WATCHED, n)))
        while await self.count("Job", WATCHED) <= numbers[-1]:  # noqa: ASYNC110 - another process makes them
            await asyncio.sleep(0.1)
        while self.op.metric("tuneloop_operator_queue_depth") > 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def samples(self, name: str) -> list[Object]:
        """What the operator made of one job: the job with its status, its children, its event."""
        job = await self.api.request("get", "GET", KINDS["FineTuneJob"].path(WATCHED, name))
        found = [job]
        for kind in ("NetworkPolicy", "ConfigMap", "Job"):
            answer = await self.api.request(
                "list", "GET", KINDS[kind].path(WATCHED), query={"labelSelector": f"tuneloop.dev/finetunejob={name}"}
            )
            found += [{"apiVersion": KINDS[kind].api_version, "kind": kind, **item} for item in answer["items"]]
        if len(found) < 4:
            raise RuntimeError(f"{name} has {len(found) - 1} children; the bare script would write less than the operator")
        return found

    async def by_script(self, numbers: range, samples: list[Object]) -> None:
        """The same objects, applied by nobody's controller: create the job, apply its status, create its children and an event."""
        job, *children = samples

        async def write(number: int) -> None:
            made = await self.post(KINDS["FineTuneJob"].path(BARE), fine_tune_job(BARE, number))
            metadata = {key: made["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
            status = {"apiVersion": made["apiVersion"], "kind": made["kind"], "metadata": metadata, "status": job["status"]}
            path = KINDS["FineTuneJob"].path(BARE, metadata["name"], "status")
            await self.api.request(
                "apply", "PATCH", path, query={"fieldManager": "bench", "force": "true"}, body=status, content_type=APPLY
            )
            for child in children:
                await self.post(KINDS[child["kind"]].path(BARE), copied(child, job, made))
            await self.post(f"/apis/events.k8s.io/v1/namespaces/{BARE}/events", event(made))

        await each(numbers, write)

    async def count(self, kind: str, namespace: str) -> int:
        answer = await self.api.request("list", "GET", KINDS[kind].path(namespace), query={"limit": "1"})
        return len(answer["items"]) + int(answer["metadata"].get("remainingItemCount") or 0)

    # --- afterwards ---

    async def stay_idle(self) -> None:
        await self.quiet()
        before, cpu = self.writes(), self.cpu_seconds()
        await asyncio.sleep(self.options.idle)
        used = (self.cpu_seconds() - cpu) / self.options.idle
        self.figures["idle_writes"] = self.writes() - before
        self.figures["idle_cpu_percent"] = round(100 * used, 1)
        self.say(f"idle for {self.options.idle} s: {self.figures['idle_writes']:.0f} writes, {100 * used:.1f} % CPU")

    async def edit(self) -> None:
        """From the edit of a job's spec to the change of its child, as a watch of the child sees it."""
        seen: dict[tuple[str, bool], asyncio.Event] = {}
        watch = asyncio.create_task(self.watch_jobs(seen))
        await asyncio.sleep(0.5)
        delays = []
        for turn in range(self.options.edits):
            name, suspend = f"job-{turn % self.options.count:05}", turn // self.options.count % 2 == 0
            arrived = seen.setdefault((name, suspend), asyncio.Event())
            started = time.monotonic()
            path = KINDS["FineTuneJob"].path(WATCHED, name)
            await self.api.request("patch", "PATCH", path, body={"spec": {"runPolicy": {"suspend": suspend}}}, content_type=MERGE)
            await asyncio.wait_for(arrived.wait(), 30)
            delays.append(time.monotonic() - started)
        watch.cancel()
        delays.sort()
        self.figures["edit_to_write_p50_seconds"] = round(statistics.median(delays), 4)
        self.figures["edit_to_write_p99_seconds"] = round(delays[min(len(delays) - 1, int(len(delays) * 0.99))], 4)
        self.say(
            f"edit to write: p50 {delays[len(delays) // 2] * 1000:.0f} ms, p99 {self.figures['edit_to_write_p99_seconds'] * 1000:.0f} ms"
        )

    async def watch_jobs(self, seen: dict[tuple[str, bool], asyncio.Event]) -> None:
        """Tells when a child is suspended, or no longer."""
        listed = await self.api.request("list", "GET", KINDS["Job"].path(WATCHED), query={"limit": "1"})
        query = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
        async with (
            self.api.credentials.session(limit=4) as session,
            session.get(
                self.api.credentials.server + KINDS["Job"].path(WATCHED), params=query, timeout=aiohttp.ClientTimeout(total=None)
            ) as answer,
        ):
            async for line in answer.content:
                job = json.loads(line)["object"]
                name = job["metadata"]["name"].rpartition("-prepare-")[0]
                seen.setdefault((name, bool(job["spec"].get("suspend"))), asyncio.Event()).set()

    async def restart(self) -> None:
        await self.quiet()
        if self.operator is not None:
            self.operator.stop()
        started = time.monotonic()
        self.start()
        wait_for(
            lambda: self.op.metric("tuneloop_operator_passes_total") >= self.options.count, 120, "every job to be looked at", every=0.1
        )
        wait_for(lambda: self.op.metric("tuneloop_operator_queue_depth") == 0, 120)
        self.figures["restart_quiet_seconds"] = round(time.monotonic() - started, 2)
        await asyncio.sleep(10)
        self.figures["restart_writes"] = self.writes()
        self.figures["restart_rss_mib"] = self.peak_mib()
        self.figures["rss_mib"] = max(self.figures["rss_mib"], self.peak_mib())
        self.say(f"restart: quiet after {self.figures['restart_quiet_seconds']} s, {self.writes():.0f} writes, peak {self.peak_mib()} MiB")

    # --- looking at the operator ---

    @property
    def op(self) -> OperatorProcess:
        assert self.operator is not None
        return self.operator

    async def quiet(self) -> None:
        """Until nothing was written for 3 s."""
        while True:
            before = self.writes()
            await asyncio.sleep(3)
            if self.writes() == before and self.op.metric("tuneloop_operator_queue_depth") == 0:
                return

    def writes(self) -> float:
        return sum(self.op.metric("tuneloop_operator_api_requests_total", verb=verb) for verb in ("create", "apply", "patch", "delete"))

    def cpu_seconds(self) -> float:
        assert self.op.process is not None
        fields = Path(f"/proc/{self.op.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self) -> float:
        assert self.op.process is not None
        lines = Path(f"/proc/{self.op.process.pid}/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


async def each(numbers: range, work: Callable[[int], Awaitable[Any]]) -> None:
    """The work for each number, by so many writers."""
    left = iter(numbers)

    async def writer() -> None:
        for number in left:
            await work(number)

    await asyncio.gather(*(writer() for _ in range(WRITERS)))


def copied(child: Object, job: Object, made: Object) -> Object:
    """A child of another job with the same content."""
    old, new = job["metadata"]["name"], made["metadata"]["name"]
    text = json.dumps({key: child[key] for key in KEPT if key in child}).replace(old, new)
    metadata = {"name": child["metadata"]["name"].replace(old, new), "labels": dict(child["metadata"]["labels"])}
    owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": new, "uid": made["metadata"]["uid"], "controller": True}
    manifest = {**json.loads(text), "metadata": {**metadata, "ownerReferences": [owner]}}
    if child["kind"] == "Job":
        manifest["spec"].pop("selector", None)
        for name in ("controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name"):
            manifest["spec"]["template"]["metadata"].get("labels", {}).pop(name, None)
    return manifest


def event(made: Object) -> Object:
    metadata = made["metadata"]
    regarding = {
        "apiVersion": made["apiVersion"],
        "kind": made["kind"],
        "name": metadata["name"],
        "namespace": BARE,
        "uid": metadata["uid"],
    }
    return {
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": f"{metadata['name']}.bench"}, "reason": "Preparing",
        "eventTime": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime()), "reportingController": "bench",
        "reportingInstance": "bench", "action": "Reconcile",
        "type": "Normal", "note": "Data and base model are being read.", "regarding": regarding,
    }  # fmt: skip


def machine() -> str:
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return f"{os.cpu_count()} cores, {memory / 1048576:.0f} GiB"


def record(figures: dict[str, float], count: int) -> None:
    path = ROOT / "bench" / "RESULTS.md"
    if not path.exists():
        path.write_text("# Figures\n\nEach line of a table is one run of one benchmark, on the machine that it names.\n")
    text = path.read_text()
    title = "## Operator (`make bench-operator`)"
    if title not in text:
        head = f"| date | machine | jobs | {' | '.join(figures)} |\n|{'---|' * (3 + len(figures))}\n"
        text = f"{text.rstrip()}\n\n{title}\n\n{head}"
    before, _, after = text.partition(title)
    table, gap, rest = after.lstrip("\n").partition("\n\n")
    row = f"| {time.strftime('%Y-%m-%d')} | {machine()} | {count} | {' | '.join(f'{value:g}' for value in figures.values())} |"
    path.write_text(f"{before}{title}\n\n{table.rstrip()}\n{row}\n{gap and chr(10) + rest}")


def kubeconfig() -> str:
    if os.environ.get("KUBECONFIG"):
        return os.environ["KUBECONFIG"]
    command = ROOT / "dev" / "cluster" / "cluster"
    subprocess.run([command, "up", "--control-plane-only"], check=True, stdout=subprocess.DEVNULL)
    return subprocess.run([command, "kubeconfig", "--control-plane-only"], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the operator on a real API server.")
    parser.add_argument("--count", type=int, default=1000, help="FineTuneJobs")
    parser.add_argument("--rounds", type=int, default=4, help="turns of operator and bare script")
    parser.add_argument("--edits", type=int, default=60, help="edits whose delay is measured; at most as many as jobs")
    parser.add_argument("--idle", type=int, default=30, help="seconds of idleness")
    parser.add_argument("--no-record", action="store_true", help="leave bench/RESULTS.md alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kubeconfig(), options, Path(folder))
        print(f"machine: {machine()}; load {os.getloadavg()[0]:.1f}", flush=True)
        figures = asyncio.run(bench.run())
    if not options.no_record:
        record(figures, options.count)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
