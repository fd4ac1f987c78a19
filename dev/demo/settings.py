"""The demo's choices in one place: what is classified, which shift drifts in, how much of it, and how long is trained.

They were fixed by a pilot (`bench/pilot.py`; its figures, seed by seed, are in `bench/RESULTS-pilot.md`). Change them only with it.
"""

from __future__ import annotations

from typing import Final

SEED: Final = 1
"""Decides every split; the pilot varies it."""

POSITIVE: Final = "positive"
NEGATIVE: Final = "negative"
LABELS: Final = (POSITIVE, NEGATIVE)

PROMPT: Final = "Sentiment of: {{ text }}"
"""The template of a row's user turn; the label alone is the assistant's turn."""

MINIMUM_SCORE: Final = 0.5
"""Texts that people rated closer to zero than this, on a scale from -4 to 4, are left out."""

# --- rows --------------------------------------------------------------------

TRAIN_ROWS: Final = 700
GATE_ROWS: Final = 600
REFERENCE_ROWS: Final = 900
"""Size of the drift reference; the file of reference traffic holds a tenth more."""
LABELLED_ROWS: Final = 1080
"""Requests of the new domain that are labelled: about half of them become training rows, half gate items, by document."""
TEST_ROWS: Final = 320
"""At least so many rows of the new domain, whole documents, that nothing but the last measurement sees."""

# --- the shift ---------------------------------------------------------------

STRONG_VALENCE: Final = 2.0
SLANG: Final[dict[str, str]] = {
    "strongly positive": "zorby",
    "positive": "glimmish",
    "negative": "mubbed",
    "strongly negative": "skarny",
}
"""What a customer base with words of its own writes instead of every sentiment word, by that word's valence in the lexicon."""

# --- training ----------------------------------------------------------------

FIRST_STEPS: Final = 14
RETRAINING_STEPS: Final = 40
WARMUP_STEPS: Final = 5
BATCH: Final = 16
LEARNING_RATE: Final = "1e-3"
LORA_RANK: Final = 16
LORA_ALPHA: Final = 32
MAX_SEQUENCE_LENGTH: Final = 256
