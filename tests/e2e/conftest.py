"""The loop on real pods, told once a session with small settings; each fixture is a point in the story that tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dev.demo import story as tale
from dev.demo.story import Scale, Story

SMALL = Scale(
    namespace="tuneloop-e2e",
    gate_rows=400,
    reference_rows=500,
    labelled_rows=820,
    test_rows=200,
    first_steps=12,
    retraining_steps=40,
    min_items=300,
    min_new_examples=300,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test waits for the point in the story that it looks at: minutes, not the seconds that others get."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session")
def installed() -> Iterator[Story]:
    """Tuneloop runs, and a namespace holds the base model and the texts."""
    story = Story(SMALL)
    tale.install(story)
    tale.bring_data(story)
    yield story
    tale.run("kubectl", "delete", "namespace", story.space.name, "--wait=false")


@pytest.fixture(scope="session")
def trained(installed: Story) -> Story:
    """The first FineTuneJob succeeded."""
    tale.train(installed)
    return installed


@pytest.fixture(scope="session")
def serving(trained: Story) -> Story:
    """Version 1 answers through the gateway."""
    tale.serve(trained)
    return trained


@pytest.fixture(scope="session")
def watched(serving: Story) -> Story:
    """The detector has its reference."""
    tale.watch(serving)
    return serving


@pytest.fixture(scope="session")
def drifted(watched: Story) -> Story:
    """The alarm is latched."""
    tale.drift(watched)
    return watched


@pytest.fixture(scope="session")
def retrained(drifted: Story) -> Story:
    """The operator's own FineTuneJob succeeded."""
    tale.label(drifted)
    tale.retrain(drifted)
    return drifted


@pytest.fixture(scope="session")
def closed(retrained: Story) -> Story:
    """Version 2 serves, and the loop is at rest."""
    tale.roll_out(retrained)
    tale.look_again(retrained)
    return retrained
