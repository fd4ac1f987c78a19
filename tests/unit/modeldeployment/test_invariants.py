"""What holds whatever happens: pods come and go, versions are approved and withdrawn, gateways lag, answer wrongly or not at all."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.unit.modeldeployment.world import RETRAINED, World, alarm, make_job, make_version

from tuneloop_gateway.contract import FeedbackReport, GatewayConfig, Outcomes, ProbeState, RevisionState

PROBES = st.sampled_from(
    [
        ProbeState(status="Done", asked=50, agreed=50),
        ProbeState(status="Done", asked=50, agreed=47),
        ProbeState(status="Running"),
        ProbeState(status="Failed", message="x"),
        ProbeState(status="NoProbes"),
    ]
)


FAST = (0,) * 100 + (500,)
COUNTED = st.sampled_from(
    [
        Outcomes(),
        Outcomes(requests=10),
        Outcomes(requests=500, first_token=FAST),
        Outcomes(requests=500, first_token=FAST),
        Outcomes(requests=500, errors=100, first_token=FAST),
    ]
)


class Life(RuleBasedStateMachine):
    """A deployment with retraining, its users, its cluster."""

    more: ClassVar[dict[str, object]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.world = World(spec=dict(RETRAINED) | self.more, feedback=FeedbackReport(labelled_train=300, labelled_gate=400))
        self.before: GatewayConfig | None = None
        self.jobs: list[str] = []

    # --- the world turns ---

    @rule(seconds=st.sampled_from([1, 1, 1, 30, 100, 4000]))
    def a_pass(self, seconds: int) -> None:
        text = self.world.config_text()
        self.before = GatewayConfig.model_validate_json(text) if text else None
        self.ready_before = {hashed: self.world.ready.get(hashed, 1) for hashed in self.world.engines()}
        self.could_judge = self.world.gateway_answers and self.world.gateways > 0
        decision = self.world.step(seconds)
        for manifest in decision.create:
            name = manifest["metadata"]["name"]
            if manifest["kind"] == "FineTuneJob" and name not in self.jobs:
                self.jobs.append(name)
        self.check_promotion()

    @precondition(lambda self: len(self.world.versions) < 5)
    @rule(approval=st.sampled_from(["Approved", "Pending"]), has_probes=st.booleans())
    def a_version_is_made(self, approval: str, has_probes: bool) -> None:
        spec = {} if has_probes else {"probesUri": None}
        self.world.versions.append(make_version(len(self.world.versions) + 1, approval=approval, **spec))

    @rule(index=st.integers(0, 4), approval=st.sampled_from(["Approved", "Withdrawn", "Rejected"]))
    def somebody_decides_about_a_version(self, index: int, approval: str) -> None:
        if index < len(self.world.versions):
            old = self.world.versions[index]
            self.world.versions[index] = old.model_copy(update={"spec": old.spec.model_copy(update={"approval": approval})})

    @rule(length=st.sampled_from([64, 128]), pin=st.sampled_from([None, 1, 2]))
    def the_spec_is_edited(self, length: int, pin: int | None) -> None:
        model = {"name": "sentiment"} | ({"version": pin} if pin else {})
        self.world.spec = self.world.spec | {"engine": {"maxModelLength": length}, "model": model}
        self.world.generation += 1

    @rule(ready=st.integers(0, 1), data=st.data())
    def pods_come_and_go(self, ready: int, data: st.DataObject) -> None:
        if engines := self.world.engines():
            self.world.ready[data.draw(st.sampled_from(engines))] = ready

    @rule(answers=st.booleans(), applies=st.booleans(), warm=st.booleans(), gateways=st.integers(0, 2), probe=PROBES)
    def gateways_do_as_they_like(self, answers: bool, applies: bool, warm: bool, gateways: int, probe: ProbeState) -> None:
        if self.world.gateways == 0:
            self.world.apply_config()  # one that starts reads the configuration before it is ready
        self.world.gateway_answers, self.world.applies, self.world.warm = answers, applies, warm
        self.world.gateways, self.world.probe = gateways, probe

    @rule(version=st.integers(1, 5), counted=COUNTED)
    def requests_are_answered(self, version: int, counted: Outcomes) -> None:
        self.world.outcomes_of[version] = counted

    @rule(raised=st.booleans())
    def inputs_change(self, raised: bool) -> None:
        text = self.world.config_text()
        config = GatewayConfig.model_validate_json(text) if text else None
        epoch = config.drift.epoch if config and config.drift else "0"
        self.world.drift = alarm(epoch=epoch) if raised else None

    @precondition(lambda self: self.jobs)
    @rule(reason=st.sampled_from([None, "GateFailed", "GatePassed"]))
    def the_job_is_seen(self, reason: str | None) -> None:
        ended = {"succeeded": "True", "reason": reason, "modelVersion": len(self.world.versions)} if reason else {}
        self.world.jobs = [make_job(self.jobs[-1], **ended)]

    # --- and this holds ---

    def check_promotion(self) -> None:
        """All traffic goes where it went before, or to an engine that was ready while gateways answered."""
        text = self.world.config_text()
        if not text:
            return
        stable = [r for r in GatewayConfig.model_validate_json(text).revisions if r.state is RevisionState.STABLE]
        was = {r.name for r in self.before.revisions if r.state is RevisionState.STABLE} if self.before else set()
        for revision in stable:
            if revision.name not in was:
                assert self.ready_before[revision.service.rpartition("-")[2]] == 1
                assert self.could_judge

    @invariant()
    def stable_and_canary_have_all_traffic(self) -> None:
        if text := self.world.config_text():
            revisions = GatewayConfig.model_validate_json(text).revisions
            whole, divided = [RevisionState.STABLE], [RevisionState.STABLE, RevisionState.CANDIDATE]
            assert [r.state for r in revisions if r.weight] in ([], whole, *([divided] if self.more else []))
            assert sum(r.weight for r in revisions) in (0, 100)
            assert len({r.name for r in revisions}) == len(revisions)

    @invariant()
    def no_gateway_sends_requests_to_an_engine_that_is_gone(self) -> None:
        if self.world.applied is not None and self.world.gateways > 0:
            assert {r.service for r in self.world.applied.revisions} <= {f"tweets-{hashed}" for hashed in self.world.engines()}

    @invariant()
    def what_serves_is_not_taken_away(self) -> None:
        """Once something was promoted, something has all traffic."""
        if "Promoted" in self.world.outcomes().values():
            assert sum(revision.weight for revision in self.world.config.revisions) == 100

    @invariant()
    def a_rejected_revision_has_no_part(self) -> None:
        rejected = {name for (kind, name), m in self.world.objects.items() if kind == "ControllerRevision" and _is_rejected(m)}
        if text := self.world.config_text():
            draining = RevisionState.DRAINING
            assert not rejected & {r.name for r in GatewayConfig.model_validate_json(text).revisions if r.weight or r.state is not draining}

    @invariant()
    def every_job_was_counted(self) -> None:
        counted = self.world.status.get("retraining", {})
        assert len(self.jobs) <= counted.get("episode", 0)
        assert counted.get("runsThisMonth", 0) <= 3

    @invariant()
    def ready_means_that_the_target_answers(self) -> None:
        if self.world.status and self.world.condition("Ready") == ("True", "Serving"):
            assert self.world.condition("Available") == ("True", "Serving")
            assert self.world.status["stable"]["revision"] in {r.name for r in self.world.config.revisions if r.weight == 100}

    @invariant()
    def a_canary_that_fails_has_no_traffic_after_the_next_pass(self) -> None:
        """Checked by what the configuration in the cluster divides: a step that was judged a failure is never among it."""
        if self.world.status and (analysis := self.world.status.get("analysis")):
            assert analysis["verdict"] != "Fail"


def _is_rejected(record: dict[str, dict[str, dict[str, str]]]) -> bool:
    return record["metadata"]["annotations"].get("tuneloop.dev/outcome") == "Rejected"


Life.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestLife = Life.TestCase


class LifeInPlace(Life):
    """The same, on devices for one engine alone."""

    more: ClassVar[dict[str, object]] = {"rollout": {"surge": "Never", "allowDowntime": True}}


LifeInPlace.TestCase.settings = Life.TestCase.settings
TestLifeInPlace = LifeInPlace.TestCase


class LifeOfCanaries(Life):
    """The same, with new revisions as canaries."""

    more: ClassVar[dict[str, object]] = {
        "rollout": {"strategy": "Canary", "steps": [{"weight": 10, "minRequests": 20}, {"weight": 50, "minRequests": 20}]}
    }


LifeOfCanaries.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
TestLifeOfCanaries = LifeOfCanaries.TestCase
