"""What a spec says of curation is what the trainer is told."""

from __future__ import annotations

from tests.unit.finetunejob.builders import make_job, make_spec

from tuneloop_operator.api.finetunejob import Resolved
from tuneloop_operator.render.run_config import run_config
from tuneloop_trainer.contract import Curation

SOURCES = [{"source": {"uri": "pvc://datasets/tweets.jsonl"}}]


def test_curation_reaches_the_trainer_field_by_field() -> None:
    asked = {
        "deduplicate": "Near",
        "personalData": "Redact",
        "quality": "Gopher",
        "languages": ["en", "de"],
        "toxicity": {"max": "0.8"},
        "classBalance": {"maxRatio": "3"},
        "decontaminate": False,
    }

    config = run_config(make_job(make_spec(data={"train": SOURCES, "curation": asked})), Resolved())

    assert config.curation == Curation(
        deduplicate="Near",
        personal_data="Redact",
        quality="Gopher",
        languages=("en", "de"),
        max_toxicity=0.8,
        max_class_ratio=3.0,
        decontaminate=False,
    )


def test_without_curation_rows_are_deduplicated_and_decontaminated_only() -> None:
    assert run_config(make_job(make_spec()), Resolved()).curation == Curation()
