"""The demo's story, phase by phase: train, serve, watch, drift, label, retrain, roll out, and what it was good for."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from dev.demo import base_model, data, settings, traffic
from dev.demo.kubectl import ROOT, CommandFailed, Namespace, condition, run, say
from dev.demo.packages import TEXTS, cache_folder, fetch, packages_folder

QUICKSTART = ROOT / "examples/quickstart"
SYSTEM = "tuneloop-system"
OPERATOR = "deployment/tuneloop-operator"
IS_LOCAL = os.environ.get("CLUSTER", "local") != "current"
PROMETHEUS = os.environ.get("PROMETHEUS_URL", "http://127.0.0.1:9090" if IS_LOCAL else "")
"""As this machine reaches it; empty: the gateway is asked instead."""
VALUES = os.environ.get("TUNELOOP_VALUES", str(ROOT / "dev/values.yaml") if IS_LOCAL else "")
"""The chart's values: which images, above all."""
TUNELOOP = str(Path(sys.executable).with_name("tuneloop"))
JOB, DEPLOYMENT, MODEL = "sentiment-tweets", "sentiment", "sentiment"
LATER_REQUESTS = 300


class StoryFailed(Exception):
    """The loop did not do what it should; the message says what, and what to look at."""


@dataclass(frozen=True)
class Scale:
    """How much of everything: the demo's own sizes, or small ones for a test of the same path."""

    namespace: str = "tuneloop-demo"
    gate_rows: int = settings.GATE_ROWS
    reference_rows: int = settings.REFERENCE_ROWS
    labelled_rows: int = settings.LABELLED_ROWS
    test_rows: int = settings.TEST_ROWS
    first_steps: int = settings.FIRST_STEPS
    retraining_steps: int = settings.RETRAINING_STEPS
    min_items: int = 400
    min_new_examples: int = 400


@dataclass
class Story:
    """State that one phase leaves to the next, and the figures for the summary."""

    scale: Scale
    space: Namespace = field(init=False)
    files: dict[str, tuple[data.Row, ...]] = field(default_factory=dict)
    minutes: list[tuple[str, float, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.space = Namespace(self.scale.namespace)
        started = float(os.environ.get("TUNELOOP_T0", time.time()))
        self.minutes.append(("Kubernetes and images", (time.time() - started) / 60, 2))

    @contextmanager
    def phase(self, name: str, budget: float) -> Iterator[None]:
        """Times a phase against its budget in minutes."""
        say()
        say(f"== {name} ==")
        start = time.monotonic()
        yield
        self.minutes.append((name, (time.monotonic() - start) / 60, budget))


# --- phases --------------------------------------------------------------------


def install(story: Story) -> None:
    """Tuneloop from its chart."""
    say(f"kubectl context: {run('kubectl', 'config', 'current-context').strip()}")
    _expect(bool(VALUES), "Set TUNELOOP_VALUES to a file of chart values that names images this cluster can pull (see dev/values.yaml).")
    say(f"helm upgrade --install tuneloop charts/tuneloop -n {SYSTEM} --values {Path(VALUES).name}")
    chart = str(ROOT / "charts/tuneloop")
    where = ("-n", SYSTEM, "--create-namespace", "--values", VALUES)
    run("helm", "upgrade", "--install", "tuneloop", chart, *where, "--wait", "--timeout", "5m")
    run("kubectl", "-n", SYSTEM, "rollout", "restart", OPERATOR)  # a moved tag of the image
    run("kubectl", "-n", SYSTEM, "rollout", "status", OPERATOR, "--timeout=180s")


def bring_data(story: Story) -> None:
    """A namespace under PodSecurity `restricted`, with the base model and the texts on claims."""
    run("kubectl", "delete", "namespace", story.scale.namespace, "--ignore-not-found", "--timeout=180s")
    run("kubectl", "create", "namespace", story.scale.namespace)
    run("kubectl", "label", "namespace", story.scale.namespace, "pod-security.kubernetes.io/enforce=restricted")
    story.space.apply(QUICKSTART / "claims.yaml")
    base = base_model.ensure(cache_folder() / base_model.NAME, packages_folder())
    say(f"Base model: SmolLM2-135M-Instruct, {base_model.digest(base)[:19]}…")
    story.files = _sized(data.build(data.read_corpus(fetch(TEXTS, packages_folder()))), story.scale)
    for name, rows in story.files.items():
        say(f"  {name:24s} {len(rows):5d} rows, for example: {rows[0].text[:70]!r} -> {rows[0].label}")
    with tempfile.TemporaryDirectory() as folder:
        data.write(story.files, Path(folder))
        _upload(story.space, {Path(folder): "/volumes/datasets", base: f"/volumes/models/bases/{base_model.NAME}"})


def train(story: Story) -> None:
    """`kubectl apply` of a FineTuneJob, and its progress until a ModelVersion is there."""
    manifest = _manifest("finetunejob.yaml")
    manifest["spec"]["training"]["maxSteps"] = story.scale.first_steps
    manifest["spec"]["evaluation"]["gates"][0]["minItems"] = story.scale.min_items
    say("kubectl apply -f examples/quickstart/finetunejob.yaml")
    say(story.space.apply(json.dumps(manifest)).strip())
    job = story.space.wait_until("finetunejob", JOB, _is_finished, _job_line)
    _tell_gates(job)
    story.figures["first"] = job["status"]
    _expect(condition(job, "Succeeded").get("status") == "True", f"{JOB} did not succeed: {condition(job, 'Succeeded').get('message')}")
    _expect(job["status"]["evaluation"]["verdict"] == "Pass", f"the gate of {JOB} said {job['status']['evaluation']['verdict']}")


def serve(story: Story) -> None:
    """`kubectl apply` of a ModelDeployment, until it answers through the gateway."""
    manifest = _manifest("modeldeployment.yaml")
    manifest["spec"]["monitoring"]["drift"]["size"] = story.scale.reference_rows
    manifest["spec"]["monitoring"]["source"] = "Prometheus" if PROMETHEUS else "Direct"
    retraining = manifest["spec"]["retraining"]
    retraining["minNewExamples"] = story.scale.min_new_examples
    retraining["template"]["spec"]["training"]["maxSteps"] = story.scale.retraining_steps
    say("kubectl apply -f examples/quickstart/modeldeployment.yaml")
    say(story.space.apply(json.dumps(manifest)).strip())
    story.space.wait_until("modeldeployment", DEPLOYMENT, lambda found: _is_true(found, "Ready"), _deployment_line)
    text = story.files["tweets/clean.jsonl"][0].text
    with story.space.forward(f"service/{DEPLOYMENT}", 80) as url:
        answer, headers = asyncio.run(traffic.ask_once(url, MODEL, text))
    say(f"POST /v1/chat/completions {text!r}")
    say(f"  -> {answer!r} from revision {headers.get('x-tuneloop-revision')}")


def watch(story: Story) -> None:
    """Traffic of the training domain becomes the detector's reference; more of it raises no alarm."""
    rows = story.files["tweets/reference.jsonl"] + story.files["tweets/clean.jsonl"]
    outcome = _send(story, rows, "tweets")
    story.figures["tweets accuracy"] = outcome.accuracy
    _expect_no_alarm(story, "the detector raised an alarm on traffic of the training domain")


def drift(story: Story) -> None:
    """Users of another domain, with words of their own: accuracy falls, evidence rises, the alarm latches."""
    before = _send(story, story.files["reviews/test.jsonl"], "reviews (held out)")
    story.figures["new domain before"] = before
    _send(story, story.files["reviews/labelled.jsonl"], "reviews")
    found = story.space.wait_until("modeldeployment", DEPLOYMENT, lambda found: _is_true(found, "DriftDetected"), _deployment_line, 180)
    story.figures["detected at"] = found["status"]["drift"]
    say(f"DriftDetected: {condition(found, 'DriftDetected')['message']}")
    say(f"RetrainingNeeded: {condition(found, 'RetrainingNeeded').get('reason')}: {condition(found, 'RetrainingNeeded').get('message')}")


def label(story: Story) -> None:
    """A reviewer labels captured requests: here the human scores that came with the texts."""
    with tempfile.TemporaryDirectory() as folder:
        captured, labels = Path(folder) / "captured.jsonl", Path(folder) / "labels.jsonl"
        command = [TUNELOOP, "label", "export", "-n", story.space.name, DEPLOYMENT, "--uniform", "--limit", "5000", "-o", str(captured)]
        say(" ".join(["tuneloop", *command[1:]]))
        run(*command)
        rows = data.labels_for(map(json.loads, captured.read_text().splitlines()), story.files["reviews/labelled.jsonl"])
        labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
        say(f"tuneloop label import -n {story.space.name} {DEPLOYMENT} labels.jsonl   ({len(rows)} labels)")
        say(run(TUNELOOP, "label", "import", "-n", story.space.name, DEPLOYMENT, str(labels)).strip())


def retrain(story: Story) -> None:
    """The operator makes a FineTuneJob on its own; two suites gate it."""
    found = story.space.wait_until("modeldeployment", DEPLOYMENT, lambda found: bool(_last_job(found)), _deployment_line, 300)
    name = _last_job(found)
    say(f"The operator made finetunejob/{name}")
    job = story.space.wait_until("finetunejob", name, _is_finished, _job_line, 3000)
    _tell_gates(job)
    story.figures["retraining"] = job["status"]
    _expect(condition(job, "Succeeded").get("status") == "True", f"{name} did not succeed: {condition(job, 'Succeeded').get('message')}")
    _expect(job["status"]["evaluation"]["verdict"] == "Pass", f"the gates of {name} said {job['status']['evaluation']['verdict']}")


def roll_out(story: Story) -> None:
    """The better model takes over without anybody editing a manifest; requests go on meanwhile."""
    stop, lost = threading.Event(), traffic.Outcome()

    def trickle() -> None:
        with story.space.forward(f"service/{DEPLOYMENT}", 80) as url:
            rows = list(story.files["tweets/clean.jsonl"])
            while not stop.is_set() and rows:
                sent = traffic.send(url, MODEL, [rows.pop()])
                lost.asked, lost.failed = lost.asked + sent.asked, lost.failed + sent.failed
                lost.errors += sent.errors
                stop.wait(1.0)

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    try:
        story.space.wait_until("modeldeployment", DEPLOYMENT, lambda found: _serves(found, 2), _deployment_line)
    finally:
        stop.set()
        thread.join()
    say(f"Requests during the roll-out: {lost.asked}, failed: {lost.failed} {lost.errors[:1]}")
    story.figures["roll-out"] = lost
    _expect(lost.failed == 0, f"{lost.failed} requests failed during the roll-out: {lost.errors[:3]}")


def look_again(story: Story) -> None:
    """The new domain is served better, and is no news to the detector any more."""
    after = _send(story, story.files["reviews/test.jsonl"], "reviews (held out)")
    story.figures["new domain after"] = after
    _send(story, story.files["reviews/later.jsonl"][:LATER_REQUESTS], "reviews (later)")
    _expect_no_alarm(story, "the detector raised an alarm again on the new domain")


# --- pieces ----------------------------------------------------------------------


def _sized(files: dict[str, tuple[data.Row, ...]], scale: Scale) -> dict[str, tuple[data.Row, ...]]:
    sizes = {
        "tweets/gate.jsonl": scale.gate_rows,
        "tweets/reference.jsonl": scale.reference_rows + scale.reference_rows // 10,
        "tweets/clean.jsonl": 300,
        "reviews/labelled.jsonl": scale.labelled_rows,
        "reviews/test.jsonl": scale.test_rows,
    }
    return {name: rows[: sizes.get(name, len(rows))] for name, rows in files.items()}


def _manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((QUICKSTART / name).read_text()))


def _upload(space: Namespace, folders: dict[Path, str]) -> None:
    """Copies folders to claims through a pod that mounts them, as `kubectl cp` does."""
    pod = (Path(__file__).parent / "loader.yaml").read_text().replace("$IMAGE", operator_image())
    space.apply(pod)
    space.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=120s")
    for source, target in folders.items():
        space.kubectl("exec", "loader", "--", "mkdir", "-p", target)
        space.kubectl("cp", f"{source}/.", f"loader:{target}")
    space.kubectl("delete", "pod", "loader", "--wait=false")


def operator_image() -> str:
    """An image with python3 that the cluster has."""
    return run("kubectl", "-n", SYSTEM, "get", OPERATOR, "-o", "jsonpath={.spec.template.spec.containers[0].image}")


def _send(story: Story, rows: Sequence[data.Row], what: str) -> traffic.Outcome:
    """Sends rows through the gateway, telling the detector's evidence as it grows."""

    def tick(outcome: traffic.Outcome) -> None:
        state = _drift(story)
        say(
            f"  {outcome.asked:5d}/{len(rows)} {what}: accuracy {outcome.accuracy:.3f}, "
            f"evidence {state['log_evidence']:.1f} of {state['log_threshold']:.1f}, effect {state['effect']:.2f}, "
            f"reference {state['reference_remaining_rows']:.0f} rows, alarm {state['alarm']:.0f}"
        )

    with story.space.forward(f"service/{DEPLOYMENT}", 80) as url:
        outcome = traffic.send(url, MODEL, rows, tick)
    say(f"{outcome.asked} {what} in {outcome.seconds:.0f} s: accuracy {outcome.accuracy:.3f}, failed {outcome.failed} {outcome.errors[:1]}")
    _expect(outcome.failed == 0, f"{outcome.failed} requests failed: {outcome.errors[:3]}")
    return outcome


def _expect_no_alarm(story: Story, otherwise: str) -> None:
    """The detector compares, and has not raised an alarm: one that still collects its reference would raise none either."""
    time.sleep(15)  # one scrape of Prometheus
    state = _drift(story)
    say(f"Detector: {state['pairs']:.0f} pairs compared, evidence {state['log_evidence']:.1f}, alarm {state['alarm']:.0f}")
    _expect(state["pairs"] > 0, f"the detector has compared nothing yet: {state}")
    _expect(state["alarm"] == 0, f"{otherwise}: {state}")


def _drift(story: Story) -> dict[str, float]:
    """The detector's gauges as Prometheus has them (0 where it has none yet); without a Prometheus, as the gateway tells them."""
    names = ("log_evidence", "log_threshold", "effect", "alarm", "reference_remaining_rows", "pairs")
    if PROMETHEUS:
        return {name: query(f'max(tuneloop_drift_{name}{{namespace="{story.space.name}",deployment="{DEPLOYMENT}"}})') for name in names}
    with story.space.forward(f"service/{DEPLOYMENT}", 8081) as url, urllib.request.urlopen(f"{url}/internal/state", timeout=10) as answer:
        drift = json.load(answer)["drift"]
    if drift is None:  # not read from its database yet
        return dict.fromkeys(names, 0.0)
    alarm = float(drift["status"] == "Alarm")
    values = (drift["logEvidence"], drift["logThreshold"], drift["effect"], alarm, drift["referenceRemaining"], drift["pairs"])
    return dict(zip(names, values, strict=True))


def query(expression: str) -> float:
    """The value of the first series, 0 where there is none."""
    with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expression})}", timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0


def _is_finished(job: dict[str, Any]) -> bool:
    done = condition(job, "Succeeded").get("status") in ("True", "False") and condition(job, "Reconciling").get("status") != "True"
    if condition(job, "Stalled").get("status") == "True":
        raise StoryFailed(f"{job['metadata']['name']} is stalled: {condition(job, 'Stalled').get('message')}")
    return done and bool(job["status"].get("finishedAt"))


def _job_line(job: dict[str, Any]) -> str:
    status = job.get("status", {})
    progress = status.get("progress") or {}
    parts = [f"{job['metadata']['name']}: {status.get('phase', 'Pending')}"]
    if progress:
        told = {"step": "display", "loss": "loss", "done at": "estimatedCompletionTime"}
        parts += [f"{name} {progress[field]}" for name, field in told.items() if progress.get(field) not in (None, "0/0")]
    message = condition(job, "Reconciling").get("message") or ""
    return ", ".join(parts) + (f" ({message})" if message else "")


def _deployment_line(found: dict[str, Any]) -> str:
    said = ((type_, condition(found, type_)) for type_ in ("Ready", "DriftDetected", "RetrainingNeeded"))
    words = [f"{type_} {it.get('status')} {it.get('reason')}" for type_, it in said]
    status = found.get("status", {})
    versions = ", ".join(
        f"{name} v{status[field]['version']}" for name, field in (("stable", "stable"), ("next", "canary")) if status.get(field)
    )
    message = condition(found, "Reconciling").get("message", "")
    return f"{DEPLOYMENT}: " + "; ".join(filter(None, [versions, *words, message]))


def _is_true(found: dict[str, Any], type_: str) -> bool:
    return condition(found, type_).get("status") == "True"


def _last_job(found: dict[str, Any]) -> str:
    return str(found.get("status", {}).get("retraining", {}).get("lastJob") or "")


def _serves(found: dict[str, Any], version: int) -> bool:
    return (found["status"].get("stable") or {}).get("version") == version and condition(found, "Ready").get("status") == "True"


def _tell_gates(job: dict[str, Any]) -> None:
    evaluation = job["status"].get("evaluation") or {}
    for gate in evaluation.get("gates", []):
        say(
            f"  gate {gate['suite']} {gate['metric']} {gate['rule']}: {gate['verdict']}; {gate['baseline']} -> {gate['candidate']} "
            f"(difference {gate['difference']}, interval {gate['interval']}, p {gate.get('p')}, n {gate['n']})"
        )
    for score in evaluation.get("scores", []):
        say(
            f"  {score['suite']}: accuracy {score.get('accuracy')} (baseline {score.get('baselineAccuracy')}), "
            f"macro-F1 {score.get('macroF1')}, majority rate {score.get('majorityRate')}, n {score['n']}"
        )


def decode(value: str) -> str:
    """A value of a Secret, as text."""
    return base64.b64decode(value).decode()


def _expect(claim: bool, otherwise: str) -> None:
    if not claim:
        raise StoryFailed(otherwise)


PHASES: tuple[tuple[str, float, Callable[[Story], None]], ...] = (
    ("Install Tuneloop", 1, install),
    ("Base model and texts onto claims", 1, bring_data),
    ("Train: a FineTuneJob", 5, train),
    ("Serve: a ModelDeployment", 3, serve),
    ("Watch: traffic of the training domain", 2.5, watch),
    ("Drift: a new domain", 2.5, drift),
    ("Label captured requests", 0.5, label),
    ("Retrain: the operator's own FineTuneJob", 8, retrain),
    ("Roll out the better model", 3, roll_out),
    ("Look again", 1.5, look_again),
)


def tell(story: Story) -> None:
    """All phases, then the table. Raises StoryFailed, CommandFailed or TimeoutError at the first that fails."""
    memory = _MemoryWatch()
    memory.start()
    try:
        for name, budget, phase in PHASES:
            with story.phase(name, budget):
                phase(story)
    finally:
        memory.stop()
        story.figures["peak memory"] = memory.peak
        summarise(story)


def summarise(story: Story) -> None:
    """The table of phases, and what came of it."""
    say()
    say(f"{'phase':45s} {'minutes':>8s} {'warm budget':>12s}")
    for name, minutes, budget in story.minutes:
        say(f"{name:45s} {minutes:8.1f} {budget:12.1f}")
    say(f"{'all':45s} {sum(m for _, m, _ in story.minutes):8.1f} {sum(b for _, _, b in story.minutes):12.1f}")
    say(f"peak memory (MemTotal - MemAvailable): {story.figures.get('peak memory', 0) / 2**30:.1f} GiB")
    before, after = story.figures.get("new domain before"), story.figures.get("new domain after")
    if before and after:
        say(f"accuracy on the new domain, held-out documents: {before.accuracy:.3f} before, {after.accuracy:.3f} after (n {after.asked})")


class _MemoryWatch(threading.Thread):
    """Peak of MemTotal - MemAvailable of this machine, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1.0):
            fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            used = int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])
            self.peak = max(self.peak, used * 1024)

    def stop(self) -> None:
        self._ended.set()
        self.join()


__all__ = ["CommandFailed", "Scale", "Story", "StoryFailed", "tell"]
